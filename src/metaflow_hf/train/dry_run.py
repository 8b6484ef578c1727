"""A run looked at before it is run: what it would do, and the very tokens it would train. Stores nothing.

Of the model only configuration and tokenizer are read, of the dataset its beginning, unless it is built already.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from metaflow_hf import environment
from metaflow_hf.config import TrainConfig
from metaflow_hf.data import BlockManager
from metaflow_hf.data.ledger import Claim
from metaflow_hf.data.preview import PreviewedBatch
from metaflow_hf.data.sampling import SampledDataset, sample_dataset
from metaflow_hf.data.sizes import chunk_samples
from metaflow_hf.errors import ConfigError, SelectionError
from metaflow_hf.report.outcome import Plan
from metaflow_hf.store import open_store
from metaflow_hf.store.datastore import existing_store
from metaflow_hf.train.blocks import format_settings
from metaflow_hf.train.heldout import HeldOut, count_copies, held_out, training_samples
from metaflow_hf.train.job import TrainingJob
from metaflow_hf.train.model_source import DescribedModel, describe_model
from metaflow_hf.train.planning import Extent, make_plan
from metaflow_hf.train.suitability import check_model


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRun:
    """A job with what is known of its model and its datasets."""

    job: TrainingJob
    model: DescribedModel
    training: SampledDataset
    heldout: SampledDataset | None

    @property
    def config(self) -> TrainConfig:
        return self.job.config

    def plan(self, *, tokens_per_second: float | None = None) -> Plan:
        """What the run would do. ``tokens_per_second`` is the speed of one worker, where it is known better than a probe
        on this machine would tell.
        """
        check_model(self.model.directory, self.config, self.model.files)
        with ExitStack() as stack:
            training = stack.enter_context(self._blocks(self.training))
            heldout = stack.enter_context(self._blocks(self.heldout)) if self.heldout else None
            plan = make_plan(
                self._extent(training),
                training,
                heldout,
                model_dir=self.model.directory,
                config=self.config,
                base_model=self.model.reference,
                speed=tokens_per_second,
                copies=count_copies(training, heldout, self.config, samples=self.training.rows),
            )
        stored = {
            "model": self.model.num_bytes,
            "dataset": self.training.num_bytes + (self.heldout.num_bytes if self.heldout else 0),
        }
        return replace(plan, disk={**stored, **plan.disk}, notes=(*plan.notes, *self._notes(plan)))

    def preview(self, position: int = 0, number: int = 0) -> PreviewedBatch:
        """Batch ``number`` of the claim at ``position``, token for token as a worker would train it.

        The order is that of training where the dataset is built; of one that is not, its first rows are shown as if
        they were all. Raises ``SelectionError`` for a position or batch that does not exist.
        """
        from metaflow_hf.data.batches import pieces
        from metaflow_hf.train.encoding import example_encoder, row_format, training_tokenizer
        from metaflow_hf.train.feed import Feed
        from metaflow_hf.train.models import declared_positions
        from metaflow_hf.train.spec import order_of

        with self._blocks(self.training) as blocks:
            sizes = training_samples([block.sample_count for block in blocks.manifest.blocks], self.config)
            order = order_of(self._order(blocks), sizes)
            if not 0 <= position < order.num_positions:
                raise SelectionError(
                    f"there are {order.num_positions:,} positions; there is no position {position}."
                )
            tokenizer = training_tokenizer(self.model.directory, self.config)
            feed = Feed(
                blocks,
                order,
                example_encoder(tokenizer, row_format(blocks, self.config), self.config),
                self.config,
                max_positions=declared_positions(self.model.directory, self.config.model),
                held_out=self._held_out(blocks),
            )
            span = order.locate(position)
            claim = Claim(span.block_id, span.chunk_id, span.start, span.stop, span.epoch, position, "")
            batches = feed.batches(claim)
        if not 0 <= number < len(batches):
            raise SelectionError(
                f"position {position} makes {len(batches)} batches; there is no batch {number}."
            )
        return PreviewedBatch(
            block_id=span.block_id,
            start=span.start,
            stop=span.stop,
            number=number,
            num_batches=len(batches),
            sequences=pieces(batches[number], tokenizer),
        )

    def _extent(self, blocks: BlockManager) -> Extent:
        config = self.config
        samples = sum(training_samples([self.training.rows], config))
        order = self._order(blocks)
        return Extent(
            lineage=self.job.lineage,
            samples=samples,
            order=order,
            num_positions=config.data.epochs * -(-samples // order["claim_samples"]),
            max_tokens=config.rounds.max_tokens,
        )

    def _order(self, blocks: BlockManager) -> dict[str, Any]:
        """As a specification describes it."""
        from metaflow_hf.train.encoding import example_encoder, row_format, rows_of_step, training_tokenizer
        from metaflow_hf.train.spec import claim_samples

        data, size, rows = self.config.data, self._chunk_size(), 1
        if self.config.rounds.claim_samples == "auto":
            tokenizer = training_tokenizer(self.model.directory, self.config)
            rows = rows_of_step(
                blocks, example_encoder(tokenizer, row_format(blocks, self.config), self.config), self.config
            )
        samples = sum(training_samples([self.training.rows], self.config))
        return {
            "seed": data.seed,
            "shuffle": data.shuffle,
            "epochs": data.epochs,
            "chunk_samples": size,
            "claim_samples": claim_samples(self.config, size, samples, step_rows=rows),
        }

    def _held_out(self, blocks: BlockManager) -> HeldOut:
        with ExitStack() as stack:
            heldout = stack.enter_context(self._blocks(self.heldout)) if self.heldout else None
            return held_out(blocks, heldout, self.config, samples=self.training.rows)

    def _blocks(self, sampled: SampledDataset) -> BlockManager:
        return BlockManager(
            sampled.store,
            self.config.data.samples_per_block,
            self._chunk_size(),
            **format_settings(self.config.data),
            enable_prefetch=False,
        )

    def _chunk_size(self) -> int:
        wanted = self.config.data.dataset_chunk_size
        return chunk_samples() if wanted == "auto" else wanted

    def _notes(self, plan: Plan) -> list[str]:
        notes = []
        if not self.training.is_exact:
            read = self.training.manifest.total_samples
            notes.append(f"the dataset is not built: samples are estimated from its first {read:,} rows.")
        if plan.seconds is None:
            notes.append(
                "time and rounds are not estimated: this model or its sequences are too large to be tried here. Say how "
                "fast a worker is, by --tokens-per-second."
            )
        return notes


@contextmanager
def dry_run(
    job: TrainingJob,
    *,
    connect: Callable[[str | None], object],
    find_model: Callable[[str], Mapping[str, Any]],
) -> Iterator[DryRun]:
    """Looks at everything that ``job`` names, in a directory that is removed at the end.

    ``connect`` makes a hub (``embedded``, a URL or the environment's) this process's own; ``find_model`` finds the
    reference of ``model.reference``. Raises the errors of the hub and of the sources, ``ConfigError`` and
    ``UnsupportedModelError``.
    """
    with tempfile.TemporaryDirectory(prefix="metaflow-hf-dry-run-") as scratch, _own_cache(Path(scratch)):
        root = Path(scratch)
        connect(job.model_hub)
        model = describe_model(job.config.model, root, find_model)
        connect(job.data_hub)
        yield DryRun(
            job=job.without_path(),
            model=model,
            training=_sample(job.config, str(job.config.data.dataset), root),
            heldout=_sample(job.config, job.config.data.evaluation_dataset, root)
            if job.config.data.evaluation_dataset
            else None,
        )


@contextmanager
def _own_cache(scratch: Path) -> Iterator[None]:
    """What is remembered of sources and downloads goes with the directory."""
    before = environment.explicit_node_cache()
    environment.set_node_cache(str(scratch / "cache"))
    try:
        yield
    finally:
        environment.set_node_cache(before)


def _sample(config: TrainConfig, location: str, root: Path) -> SampledDataset:
    data = config.data
    sampled = sample_dataset(
        location,
        open_store(root / "datasets"),
        existing_store() or open_store(root / "nothing"),
        samples_per_block=data.samples_per_block,
        **format_settings(data),
        on_bad_row=data.on_bad_row,
        documents=data.documents,
        keep_columns=data.keep_columns,
        max_rows=data.max_samples if location == data.dataset else config.evaluation.max_samples,
    )
    if not sampled.manifest.total_samples:
        raise ConfigError(f"{location} has no rows with text.")
    return sampled
