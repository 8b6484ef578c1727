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
from metaflow_hf.config import DataConfig, TrainConfig
from metaflow_hf.data import BlockManager
from metaflow_hf.data.ledger import Claim
from metaflow_hf.data.mixture import MixedBlocks, MixedPart, ReadableBlocks
from metaflow_hf.data.preview import PreviewedBatch
from metaflow_hf.data.sampling import SampledDataset, sample_dataset
from metaflow_hf.data.sizes import chunk_samples
from metaflow_hf.errors import ConfigError, SelectionError
from metaflow_hf.report.outcome import Plan
from metaflow_hf.store import ObjectStore, open_store
from metaflow_hf.store.datastore import existing_store
from metaflow_hf.train.blocks import check_sources, format_settings, naming_dataset
from metaflow_hf.train.heldout import count_copies, held_out, training_samples
from metaflow_hf.train.job import TrainingJob
from metaflow_hf.train.model_source import DescribedModel, describe_model
from metaflow_hf.train.planning import Extent, make_plan
from metaflow_hf.train.sides import HeldOut
from metaflow_hf.train.suitability import check_model


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRun:
    """A job with what is known of its model and its datasets; ``training`` are the datasets of a mixture, or the one that
    is trained.
    """

    job: TrainingJob
    model: DescribedModel
    training: tuple[SampledDataset, ...]
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
            training = stack.enter_context(self._training())
            heldout = (
                stack.enter_context(self._blocks(self.heldout, self.config.data)) if self.heldout else None
            )
            plan = make_plan(
                self._extent(training),
                training,
                heldout,
                model_dir=self.model.directory,
                config=self.config,
                base_model=self.model.reference,
                speed=tokens_per_second,
                copies=count_copies(training, heldout, self.config, samples=self._samples()),
            )
        stored = {
            "model": self.model.num_bytes,
            "dataset": sum(one.num_bytes for one in (*self.training, self.heldout) if one),
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

        with self._training() as blocks:
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
            dataset, block_id = "", span.block_id
            if isinstance(blocks, MixedBlocks):
                dataset, block_id = blocks.place_of(block_id)
        if not 0 <= number < len(batches):
            raise SelectionError(
                f"position {position} makes {len(batches)} batches; there is no batch {number}."
            )
        return PreviewedBatch(
            block_id=block_id,
            dataset=dataset,
            start=span.start,
            stop=span.stop,
            number=number,
            num_batches=len(batches),
            sequences=pieces(batches[number], tokenizer),
        )

    def _extent(self, blocks: ReadableBlocks) -> Extent:
        order = self._order(blocks)
        samples = order["num_samples"]
        return Extent(
            lineage=self.job.lineage,
            samples=samples,
            order=order,
            num_positions=order["epochs"] * -(-samples // order["claim_samples"]),
            max_tokens=self.config.rounds.max_tokens,
        )

    def _order(self, blocks: ReadableBlocks) -> dict[str, Any]:
        """As a specification describes it."""
        from metaflow_hf.train.encoding import example_encoder, row_format, rows_of_step, training_tokenizer
        from metaflow_hf.train.mixtures import describe_parts
        from metaflow_hf.train.spec import describe_order

        rows = 1
        if self.config.rounds.claim_samples == "auto":
            tokenizer = training_tokenizer(self.model.directory, self.config)
            rows = rows_of_step(
                blocks, example_encoder(tokenizer, row_format(blocks, self.config), self.config), self.config
            )
        return describe_order(
            self.config,
            self._chunk_size(),
            samples=sum(training_samples([self._samples()], self.config)),
            step_rows=rows,
            datasets=describe_parts(blocks, self.config) if isinstance(blocks, MixedBlocks) else (),
        )

    def _held_out(self, blocks: ReadableBlocks) -> HeldOut:
        with ExitStack() as stack:
            heldout = (
                stack.enter_context(self._blocks(self.heldout, self.config.data)) if self.heldout else None
            )
            return held_out(blocks, heldout, self.config, samples=self._samples())

    def _samples(self) -> int:
        """The rows of all datasets that are trained."""
        return sum(one.rows for one in self.training)

    def _training(self) -> ReadableBlocks:
        data = self.config.data
        if not data.datasets:
            return self._blocks(self.training[0], data)
        parts = []
        for number, (one, sampled) in enumerate(zip(data.datasets, self.training, strict=True)):
            parts.append(
                MixedPart(
                    name=one.title,
                    blocks=self._blocks(sampled, data.only(number)),
                    max_samples=one.max_samples,
                    total_samples=sampled.rows,
                )
            )
        return MixedBlocks(parts)

    def _blocks(self, sampled: SampledDataset, data: DataConfig) -> BlockManager:
        return BlockManager(
            sampled.store,
            data.samples_per_block,
            self._chunk_size(),
            **format_settings(data),
            enable_prefetch=False,
        )

    def _chunk_size(self) -> int:
        wanted = self.config.data.dataset_chunk_size
        return chunk_samples() if wanted == "auto" else wanted

    def _notes(self, plan: Plan) -> list[str]:
        notes = []
        for number, one in enumerate(self.training):
            if not one.is_exact:
                names = [part.title for part in self.config.data.datasets] or ["the dataset"]
                read = one.manifest.total_samples
                notes.append(
                    f"{names[number]} is not built: samples are estimated from its first {read:,} rows."
                )
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
        root, data = Path(scratch), job.config.data
        connect(job.model_hub)
        model = describe_model(job.config.model, root, find_model)
        connect(job.data_hub)
        yield DryRun(
            job=job.without_path(),
            model=model,
            training=_training(job.config, root),
            heldout=_sample(data, data.evaluation_dataset, root, job.config.evaluation.max_samples)
            if data.evaluation_dataset
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


def _datastore(root: Path) -> ObjectStore:
    """Where datasets may be built already; empty where there is no datastore yet."""
    return existing_store() or open_store(root / "nothing")


def _training(config: TrainConfig, root: Path) -> tuple[SampledDataset, ...]:
    data = config.data
    if not data.datasets:
        return (_sample(data, str(data.dataset), root, data.max_samples),)
    check_sources(data, _datastore(root))
    found = []
    for number, one in enumerate(data.datasets):
        with naming_dataset(data, number):
            found.append(_sample(data.only(number), one.dataset, root, one.max_samples))
    return tuple(found)


def _sample(data: DataConfig, location: str, root: Path, max_rows: int | None) -> SampledDataset:
    sampled = sample_dataset(
        location,
        open_store(root / "datasets"),
        _datastore(root),
        samples_per_block=data.samples_per_block,
        **format_settings(data),
        on_bad_row=data.on_bad_row,
        documents=data.documents,
        keep_columns=data.keep_columns,
        max_rows=max_rows,
    )
    if not sampled.manifest.total_samples:
        raise ConfigError(f"{location} has no rows with text.")
    return sampled
