"""What a store holds: how much of what, which models, and whether the bytes are still right."""

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from metaflow_hf.errors import IntegrityError, NotFound
from metaflow_hf.store.blobs import download_blob
from metaflow_hf.store.collection import unreferenced
from metaflow_hf.store.manifests import Manifest, read_manifest, read_manifests
from metaflow_hf.store.node_cache import NodeCache
from metaflow_hf.store.objects import ObjectStore


@dataclass(frozen=True, slots=True)
class StoredModel:
    """One saved model or checkpoint as its key and manifest tell it; ``size`` in bytes."""

    key: str
    label: str
    pathspec: str
    size: int
    num_files: int
    last_modified: datetime
    metadata: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "last_modified": self.last_modified.isoformat()}


@dataclass(frozen=True, slots=True)
class Usage:
    """Objects and bytes below one name."""

    name: str
    objects: int
    size: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Problem:
    """One file whose stored bytes are wrong or missing."""

    manifest: str
    path: str
    blob: str
    problem: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def stored_models(store: ObjectStore, prefix: str = "models") -> list[StoredModel]:
    """All models below a prefix (``models/<flow>``, …), newest first. Raises ``IntegrityError`` for a damaged one."""
    found = [
        StoredModel(
            key=info.key,
            label=str(manifest.about.get("label", "")),
            pathspec="/".join(info.key.split("/")[1:5]),
            size=manifest.size,
            num_files=len(manifest.files),
            last_modified=info.last_modified,
            metadata=dict(manifest.about.get("metadata", {})),
        )
        for info, manifest in read_manifests(store, prefix)
    ]
    return sorted(found, key=lambda model: model.last_modified, reverse=True)


def usage(store: ObjectStore) -> list[Usage]:
    """Bytes by what they are for, largest first, and those that nothing refers to any more."""
    sizes: defaultdict[str, list[int]] = defaultdict(list)
    for info in store.list():
        sizes[info.key.partition("/")[0]].append(info.size)
    found = [Usage(name, len(items), sum(items)) for name, items in sizes.items()]
    found.sort(key=lambda item: (-item.size, item.name))
    unused = unreferenced(store)
    return [*found, Usage("blobs that nothing refers to", len(unused), sum(unused.values()))]


def node_usage(cache: NodeCache) -> Usage:
    """What the node's cache takes on this machine's disk; a file that is linked into a task's directory counts once."""
    sizes: dict[tuple[int, int], int] = {}
    # Other processes come and go: a directory that is gone is passed over.
    for folder, _, names in os.walk(cache.root):
        for name in names:
            with suppress(FileNotFoundError):
                found = os.stat(os.path.join(folder, name))  # noqa: PTH116, PTH118  there may be many
                sizes[found.st_dev, found.st_ino] = found.st_size
    return Usage(str(cache.root), len(sizes), sum(sizes.values()))


def verify(store: ObjectStore, keys: Iterable[str], cache: NodeCache) -> Iterator[tuple[str, list[Problem]]]:
    """Reads every blob of these manifests once and compares size and sha256.

    Yields each distinct blob with the files whose bytes are wrong or missing: none where all is well; and each
    damaged manifest by its key, with one problem that names no file. Nothing is changed, and nothing of the node's
    cache is trusted.
    """
    by_blob: dict[str, list[tuple[str, Manifest, int]]] = {}
    for key in keys:
        try:
            manifest = read_manifest(store, key)
        except NotFound:  # deleted in the meantime
            continue
        except IntegrityError as error:
            yield key, [Problem(key, "", key, f"{error} Remove it: `metaflow hf snapshots rm {key}`.")]
            continue
        for number, file in enumerate(manifest.files):
            by_blob.setdefault(file.blob, []).append((key, manifest, number))
    place = cache.new_work_dir("verify")
    try:
        for blob, uses in by_blob.items():
            _, manifest, number = uses[0]
            try:
                download_blob(store, blob, place / "blob", manifest.files[number].digest, verify=True)
            except (NotFound, IntegrityError) as error:
                yield blob, [Problem(key, used.files[n].path, blob, str(error)) for key, used, n in uses]
            else:
                yield blob, []
    finally:
        cache.remove_work_dir(place)
