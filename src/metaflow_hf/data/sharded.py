"""Large sources into blocks on as many machines as wanted, with a result that does not depend on how many.

Each file of a source is a shard, and each shard is built as a dataset of its own, with its own lease, commits and
completion; no block spans two shards. When all are complete, one manifest lists their blocks in order:

    shards/00003/…          blocks/, commits/ and block_manifest.json of one shard
    block_manifest.json     created once, at the join; its ``file_path`` leads into the shards
    commits/complete.json   created after it

A killed builder loses its open block only: the next one goes on behind the last commit of that shard. Since the
last block of each shard may be short, this is another dataset, under another key, than one sequence of full blocks.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import msgspec

from metaflow_hf.data.build import dataset_key, default_store, plan_dataset, write_dataset
from metaflow_hf.data.manifest import BlockEntry, BlockManifest, Completion, DatasetSpec
from metaflow_hf.data.records import (
    COMPLETE_KEY,
    MANIFEST_KEY,
    encode,
    is_published,
    read_completion,
    read_manifest,
)
from metaflow_hf.data.sources import Source, open_source
from metaflow_hf.data.sources.documents import document_format
from metaflow_hf.data.sources.files import FileSource
from metaflow_hf.data.writer import LEASE_SECONDS
from metaflow_hf.errors import ConfigError, DatasetMismatch, NotFound, SelectionError
from metaflow_hf.store import ObjectStore

logger = logging.getLogger("metaflow_hf.data")

# A document is a few rows: each in a block of its own would make a block of nothing.
DOCUMENTS_PER_SHARD: Final = 1000
READERS: Final = 16
SHARDS: Final = "shards"

ShardProgress = Callable[[int, BlockManifest], None]


@dataclass(frozen=True, kw_only=True)
class ShardedDataset:
    """What is built from which source, shard by shard; ``to_json`` carries it from machine to machine.

    ``location`` is the source at the commit that the plan saw; ``sizes`` are the bytes of each shard, by number.
    """

    location: str
    spec: DatasetSpec
    sizes: tuple[int, ...]

    @classmethod
    def plan(cls, location: str | Path, **settings: Any) -> Self:
        """Decides what will be built; nothing is downloaded but a few rows, nothing is written.

        ``settings`` are those of ``plan_dataset`` (``samples_per_block`` and so on). Raises ``ConfigError``, among others
        for ``max_rows`` and ``max_bytes``, which shards that do not know of each other cannot keep, and whatever
        opening the source raises.
        """
        limits = [name for name in ("max_rows", "max_bytes") if settings.get(name) is not None]
        if limits:
            raise ConfigError(
                f"{' and '.join(limits)}: a dataset by shards is always whole; use build_blocks."
            )
        source = open_source(location, documents=settings.get("documents", "whole"))
        spec = msgspec.structs.replace(plan_dataset(source, **settings), by_shard=True)
        pinned = f"{source.source}@{source.commit_hash}" if source.commit_hash else str(location)
        return cls(location=pinned, spec=spec, sizes=tuple(map(_size, shards_of(source))))

    def to_json(self) -> dict[str, Any]:
        """A plain dict, as an artifact holds it."""
        return {"location": self.location, "spec": self.spec.to_json(), "sizes": list(self.sizes)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """What ``to_json`` wrote."""
        return cls(
            location=value["location"],
            spec=msgspec.convert(value["spec"], DatasetSpec),
            sizes=tuple(value["sizes"]),
        )

    def num_bytes(self, shards: Sequence[int]) -> int:
        """The bytes of these shards, as the source stores them."""
        return sum(self.sizes[shard] for shard in shards)

    @property
    def key(self) -> str:
        """Where the dataset lies in the datastore; ``--dataset`` of a training takes it."""
        return f"datasets/{dataset_key(self.spec)}"

    def groups(self, num_branches: int) -> list[list[int]]:
        """The shards of each of at most ``num_branches`` branches, of about equal bytes; none is empty.

        Raises ``ConfigError`` for fewer than one branch.
        """
        if num_branches < 1:
            raise ConfigError(f"num_branches must be at least 1, got {num_branches}.")
        branches: list[list[int]] = [[] for _ in range(min(num_branches, len(self.sizes)))]
        loads = [0] * len(branches)
        for shard in sorted(range(len(self.sizes)), key=lambda number: (-self.sizes[number], number)):
            lightest = min(range(len(loads)), key=lambda number: (loads[number], len(branches[number])))
            branches[lightest].append(shard)
            loads[lightest] += self.sizes[shard]
        return [sorted(branch) for branch in branches]

    def build(
        self,
        shards: Sequence[int],
        store: ObjectStore | None = None,
        *,
        progress: ShardProgress | None = None,
        meter: Callable[[Source], Source] | None = None,
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        """Builds what is missing of these shards; complete ones cost one look each and no request to the hub.

        ``store`` is the dataset's root (default: under ``key`` in the running flow's datastore). ``progress`` is called
        with the shard's number and its manifest so far, after each block and once for a shard that is complete;
        ``meter`` may put something that counts around the source of each.
        Raises ``DatasetMismatch`` when the source is not what the plan saw, ``BadRowError``, and the hub's errors.
        """
        root = store or default_store(self.spec)
        missing = []
        for shard in shards:
            if is_published(_shard_store(root, shard)):
                _tell(progress, shard, self._manifest(root, shard))
            else:
                missing.append(shard)
        sources = self._open_shards() if missing else []
        for shard in missing:
            manifest = write_dataset(
                meter(sources[shard]) if meter else sources[shard],
                self._shard_spec(sources[shard]),
                _shard_store(root, shard),
                progress=lambda manifest, shard=shard: _tell(progress, shard, manifest),  # type: ignore[misc]
                lease_seconds=lease_seconds,
                may_be_empty=True,
            )
            _tell(progress, shard, manifest)

    def assemble(self, store: ObjectStore | None = None) -> BlockManifest:
        """Makes one dataset of all shards and returns its manifest. Idempotent; nothing is copied.

        Raises ``NotFound`` that names the shards which are not complete, ``SelectionError`` when all are empty, and ``DatasetMismatch`` when another dataset was
        assembled there before.
        """
        root = store or default_store(self.spec)
        with ThreadPoolExecutor(READERS, thread_name_prefix="shard") as pool:
            shards = list(pool.map(lambda shard: self._manifest(root, shard), range(len(self.sizes))))
        unfinished = [number for number, shard in enumerate(shards) if not shard.is_complete]
        if unfinished:
            raise NotFound(
                f"{root.uri}: {len(unfinished)} of {len(shards)} shards are not complete "
                f"({', '.join(map(str, unfinished[:5]))} …): run their branches again, then join."
            )
        manifest = BlockManifest.of(
            self.spec,
            join_blocks(shards),
            skipped_rows=sum(shard.skipped_rows for shard in shards),
            is_complete=True,
        )
        if not manifest.total_samples:
            raise SelectionError(
                f"{self.location} holds no rows that can be stored: {manifest.skipped_rows:,} were skipped."
            )
        # The manifest first: whoever finds the completion finds the blocks as well.
        _create(root, MANIFEST_KEY, msgspec.json.format(encode(manifest), indent=2) + b"\n")
        completion = Completion(
            total_blocks=manifest.total_blocks,
            total_samples=manifest.total_samples,
            skipped_rows=manifest.skipped_rows,
            digest=manifest.digest,
            spec=self.spec,
        )
        _create(root, COMPLETE_KEY, encode(completion))
        return manifest

    def _open_shards(self) -> list[Source]:
        source = open_source(self.location, documents=self.spec.documents or "whole")
        seen = (source.source, source.source_digest, source.commit_hash)
        shards = shards_of(source)
        planned = (self.spec.source, self.spec.source_digest, self.spec.commit_hash)
        if seen != planned or tuple(map(_size, shards)) != self.sizes:
            raise DatasetMismatch(
                f"{self.location} is not what it was when the build was planned: start it again from the beginning."
            )
        return shards

    def _shard_spec(self, shard: Source) -> DatasetSpec:
        return msgspec.structs.replace(
            self.spec, dataset_name=shard.name, source=shard.source, by_shard=False
        )

    def _manifest(self, root: ObjectStore, shard: int) -> BlockManifest:
        """What is there of a shard. Raises ``DatasetMismatch`` for a complete one of another source or other settings."""
        store = _shard_store(root, shard)
        completion = read_completion(store)
        if completion is not None:
            stored = completion.spec
            source = stored.source if stored.source.startswith(f"{self.spec.source}/") else self.spec.source
            expected = msgspec.structs.replace(
                self.spec, dataset_name=stored.dataset_name, source=source, by_shard=False
            )
            expected.check_same(stored, where=store.uri)
        manifest = read_manifest(store)
        return manifest or BlockManifest.of(self.spec, [], skipped_rows=0, is_complete=False)


def shards_of(source: Source) -> list[Source]:
    """Each file of a source as a source of its own, in order; small documents a thousand at a time.

    Depends on the source alone. A source that is no list of files is one shard.
    """
    if not isinstance(source, FileSource):
        return [source]
    files = source.files
    step = DOCUMENTS_PER_SHARD if all(document_format(file.name) for file in files) else 1
    return [
        dataclasses.replace(
            source,
            name=f"{source.name}-{at // step:05d}",
            source=f"{source.source}/{files[at].name}",
            files=files[at : at + step],
        )
        for at in range(0, len(files), step)
    ]


def shard_prefix(shard: int) -> str:
    """Where a shard lies below its dataset."""
    return f"{SHARDS}/{shard:05d}"


def join_blocks(shards: Sequence[BlockManifest]) -> list[BlockEntry]:
    """The blocks of all shards in order, numbered through, with their places below the whole dataset."""
    blocks: list[BlockEntry] = []
    for number, shard in enumerate(shards):
        for block in shard.blocks:
            start = blocks[-1].end_index if blocks else 0
            blocks.append(
                msgspec.structs.replace(
                    block,
                    block_id=len(blocks),
                    start_index=start,
                    end_index=start + block.sample_count,
                    file_path=f"{shard_prefix(number)}/{block.key}",
                )
            )
    return blocks


def _shard_store(root: ObjectStore, shard: int) -> ObjectStore:
    return root.child(shard_prefix(shard))


def _size(shard: Source) -> int:
    return sum(file.size for file in shard.files) if isinstance(shard, FileSource) else 0


def _tell(progress: ShardProgress | None, shard: int, manifest: BlockManifest) -> None:
    if progress is not None:
        progress(shard, manifest)


def _create(root: ObjectStore, key: str, data: bytes) -> None:
    if not root.create(key, data).created:
        raise DatasetMismatch(
            f"{root.uri}/{key} holds another dataset: its shards were built from something else. Choose another place."
        )
