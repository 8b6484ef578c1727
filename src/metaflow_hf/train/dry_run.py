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
from metaflow_hf.hub.request import SnapshotRequest
from metaflow_hf.hub.snapshots import Snapshots
from metaflow_hf.report.outcome import Plan
from metaflow_hf.store import configured_store, open_store
from metaflow_hf.store.datastore import existing_store
from metaflow_hf.store.node_cache import NodeCache
from metaflow_hf.train.description import (
    DESCRIPTION,
    NO_DESCRIPTION,
    is_description,
    read_config_json,
    write_description,
)
from metaflow_hf.train.heldout import HeldOut, count_copies, evaluation_rows, training_samples
from metaflow_hf.train.job import TrainingJob
from metaflow_hf.train.planning import Extent, make_plan
from metaflow_hf.train.suitability import check_model


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRun:
    """A job with what is known of its model and its datasets; ``base_model`` is a reference, or as much of one as
    is known, ``model_bytes`` the size of all the model's files.
    """

    job: TrainingJob
    model_dir: Path
    base_model: Mapping[str, Any]
    model_bytes: int
    training: SampledDataset
    heldout: SampledDataset | None

    @property
    def config(self) -> TrainConfig:
        return self.job.config

    def plan(self, *, tokens_per_second: float | None = None) -> Plan:
        """What the run would do. ``tokens_per_second`` is the speed of one worker, where it is known better than a probe
        on this machine would tell.
        """
        check_model(self.model_dir, self.config)
        with ExitStack() as stack:
            training = stack.enter_context(self._blocks(self.training))
            heldout = stack.enter_context(self._blocks(self.heldout)) if self.heldout else None
            plan = make_plan(
                self._extent(),
                training,
                heldout,
                model_dir=self.model_dir,
                config=self.config,
                base_model=self.base_model,
                speed=tokens_per_second,
                copies=count_copies(training, heldout, self.config, samples=self.training.rows),
            )
        stored = {
            "model": self.model_bytes,
            "dataset": self.training.num_bytes + (self.heldout.num_bytes if self.heldout else 0),
        }
        return replace(plan, disk={**stored, **plan.disk}, notes=(*plan.notes, *self._notes(plan)))

    def preview(self, position: int = 0, number: int = 0) -> PreviewedBatch:
        """Batch ``number`` of the claim at ``position``, token for token as a worker would train it.

        The order is that of training where the dataset is built; of one that is not, its first rows are shown as if
        they were all. Raises ``SelectionError`` for a position or batch that does not exist.
        """
        from metaflow_hf.data.batches import pieces
        from metaflow_hf.train.feed import Feed
        from metaflow_hf.train.models import declared_positions, load_tokenizer
        from metaflow_hf.train.spec import claim_samples, order_of

        with self._blocks(self.training) as blocks:
            size = blocks.dataset_chunk_size
            order = order_of(
                {
                    "seed": self.config.data.seed,
                    "shuffle": self.config.data.shuffle,
                    "epochs": self.config.data.epochs,
                    "chunk_samples": size,
                    "claim_samples": claim_samples(self.config, size, self.training.rows),
                },
                [block.sample_count for block in blocks.manifest.blocks],
            )
            if not 0 <= position < order.num_positions:
                raise SelectionError(
                    f"there are {order.num_positions:,} positions; there is no position {position}."
                )
            tokenizer = load_tokenizer(self.model_dir, trust_remote_code=self.config.model.trust_remote_code)
            feed = Feed(
                blocks,
                order,
                tokenizer,
                self.config,
                text_column=self.config.data.text_column or blocks.text_column,
                max_positions=declared_positions(self.model_dir, self.config.model),
                held_out=self._held_out(),
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

    def _extent(self) -> Extent:
        from metaflow_hf.train.spec import claim_samples

        config = self.config
        samples = sum(training_samples([self.training.rows], config))
        claim = claim_samples(config, self._chunk_size(), samples)
        return Extent(
            lineage=self.job.lineage,
            samples=samples,
            claim_samples=claim,
            num_positions=config.data.epochs * -(-samples // claim),
            max_tokens=config.rounds.max_tokens,
        )

    def _held_out(self) -> HeldOut:
        if self.heldout is None:
            return HeldOut.of(self.training.rows, self.config)
        with self._blocks(self.heldout) as blocks:
            return HeldOut.copies_of(evaluation_rows(blocks, self.config.evaluation.max_samples))

    def _blocks(self, sampled: SampledDataset) -> BlockManager:
        return BlockManager(
            sampled.store,
            self.config.data.samples_per_block,
            self._chunk_size(),
            text_column=self.config.data.text_column,
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
        model_dir, base_model, model_bytes = _describe_model(job.config, root, find_model)
        connect(job.data_hub)
        yield DryRun(
            job=job,
            model_dir=model_dir,
            base_model=base_model,
            model_bytes=model_bytes,
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
        text_column=data.text_column,
        on_bad_row=data.on_bad_row,
        keep_columns=data.keep_columns,
        max_rows=data.max_samples if location == data.dataset else config.evaluation.max_samples,
    )
    if not sampled.manifest.total_samples:
        raise ConfigError(f"{location} has no rows with text.")
    return sampled


def _describe_model(
    config: TrainConfig, root: Path, find_model: Callable[[str], Mapping[str, Any]]
) -> tuple[Path, Mapping[str, Any], int]:
    target, cache = root / "model", NodeCache(root / "cache")
    if config.model.reference:
        reference = find_model(config.model.reference)
        directory = write_description(configured_store(), reference, target, cache=cache)
        return directory, reference, reference["size"]
    snapshots = Snapshots(open_store(root / "hub"), cache)
    repo_id, revision = str(config.model.repo_id), config.model.revision
    files = snapshots.plan(SnapshotRequest.of(repo_id, revision=revision))
    if not any(is_description(file.filename) for file in files):
        # Says what is missing; a selection of nothing would say less.
        read_config_json(target, repo_id)
    described = snapshots.ensure(
        SnapshotRequest.of(
            repo_id,
            revision=revision,
            allow_patterns=list(DESCRIPTION),
            ignore_patterns=list(NO_DESCRIPTION),
        )
    )
    size = sum(file.file_size or 0 for file in files)
    return snapshots.load(described, target), described.to_json(), size
