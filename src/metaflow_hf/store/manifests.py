"""Manifests: the list of files that makes a snapshot, model or checkpoint, written when all its blobs are there.

A manifest is canonical JSON, so that equal contents have equal bytes; its digest is the sha256 of these bytes.
It holds no time, host or token: nothing but the content and what ``about`` says of it.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Final, Self

from metaflow_hf.errors import IntegrityError, NotFound
from metaflow_hf.store.blobs import blob_key, condemned_blobs
from metaflow_hf.store.filenames import check_filenames
from metaflow_hf.store.objects import Digest, ObjectInfo, ObjectStore, encode_json

SCHEMA: Final = 1
READERS: Final = 8
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_SHA1: Final = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class ManifestFile:
    """One file: its relative path, size in bytes, sha256 and the key of its blob.

    ``oid`` is git's sha1 of a small file of a hub repository, by which a later commit recognises it.
    """

    path: str
    size: int
    sha256: str
    blob: str
    oid: str | None = None

    @property
    def digest(self) -> Digest:
        return Digest(sha256=self.sha256, size=self.size)

    def to_json(self) -> dict[str, Any]:
        fields = {"path": self.path, "size": self.size, "sha256": self.sha256, "blob": self.blob}
        return fields if self.oid is None else {**fields, "oid": self.oid}


@dataclass(frozen=True, slots=True)
class Manifest:
    """Files sorted by path, and ``about``: what they are (type, repository and commit, label, metadata)."""

    files: tuple[ManifestFile, ...]
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_filenames(file.path for file in self.files)
        object.__setattr__(self, "files", tuple(sorted(self.files, key=lambda file: file.path)))

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def digest(self) -> str:
        """The sha256 of ``to_bytes()``."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        files = [file.to_json() for file in self.files]
        return encode_json({"schema": SCHEMA, "about": dict(self.about), "files": files})

    @classmethod
    def from_bytes(cls, data: bytes, *, key: str) -> Self:
        """Raises ``IntegrityError`` naming ``key`` for anything that is no manifest, ``SelectionError`` for file
        names that may not be written.
        """
        try:
            value = json.loads(data)
            schema, about = int(value["schema"]), dict(value["about"])
            files = tuple(_file(item) for item in value["files"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise IntegrityError(
                f"the manifest {key} is damaged: {type(error).__name__} {error}. Delete this object; a snapshot is then "
                "downloaded again, a model or checkpoint must be saved again."
            ) from error
        if schema > SCHEMA:
            raise IntegrityError(
                f"the manifest {key} was written by a newer metaflow-hf: upgrade metaflow-hf."
            )
        return cls(files=files, about=about)


def read_manifest(store: ObjectStore, key: str, *, digest: str | None = None) -> Manifest:
    """The manifest at ``key``. Raises ``NotFound``; ``IntegrityError`` when it is damaged or not the expected one.

    One that names the same bytes as at first, but under later generations of their keys, is the expected one.
    """
    data = store.get(key)
    manifest = Manifest.from_bytes(data, key=key)
    is_expected = digest is None or digest == hashlib.sha256(data).hexdigest()
    if not is_expected and digest != _at_first(manifest).digest:
        raise IntegrityError(
            f"the manifest {store.uri}/{key} is not the one that was referred to (digest {digest}): it was damaged "
            "or replaced."
        )
    return manifest


def _at_first(manifest: Manifest) -> Manifest:
    """As it was before any of its blobs was condemned and stored anew."""
    return replace(
        manifest, files=tuple(replace(file, blob=blob_key(file.sha256)) for file in manifest.files)
    )


def read_manifests(store: ObjectStore, prefix: str) -> Iterator[tuple[ObjectInfo, Manifest]]:
    """All manifests below a prefix, in order of their keys; those deleted in the meantime are left out.

    Raises ``IntegrityError`` naming one that is damaged.
    """

    def read(info: ObjectInfo) -> tuple[ObjectInfo, Manifest] | None:
        try:
            return info, read_manifest(store, info.key)
        except NotFound:
            return None

    with ThreadPoolExecutor(READERS) as pool:
        yield from (found for found in pool.map(read, store.list(prefix)) if found is not None)


def publish(store: ObjectStore, key: str, manifest: Manifest) -> Manifest:
    """Makes the manifest visible, once and whole; returns the one that readers see, ours or an equal earlier one.

    All blobs must be stored already. Raises ``IntegrityError`` when the key names other content.
    """
    outcome = store.create(key, manifest.to_bytes())
    published = manifest if outcome.created else Manifest.from_bytes(outcome.content, key=key)
    if _content(published) != _content(manifest):
        raise IntegrityError(f"{store.uri}/{key} names other files than those that belong there.")
    return published


def condemned_files(store: ObjectStore, manifest: Manifest) -> list[ManifestFile]:
    """The files whose blob was condemned before the manifest existed: they must be stored again."""
    condemned = condemned_blobs(store)
    return [file for file in manifest.files if file.blob in condemned]


def _file(item: Mapping[str, Any]) -> ManifestFile:
    file = ManifestFile(
        path=str(item["path"]),
        size=int(item["size"]),
        sha256=str(item["sha256"]),
        blob=str(item["blob"]),
        oid=item.get("oid"),
    )
    # These name files on the node and objects in the store: a manifest that was tampered with must lead nowhere else.
    if not _SHA256.fullmatch(file.sha256) or not _is_blob_of(file.blob, file.sha256):
        raise ValueError(f"{file.path!r} is not stored under its own sha256")
    if file.size < 0 or not (file.oid is None or _SHA1.fullmatch(file.oid)):
        raise ValueError(f"{file.path!r} has no valid size or git sha1")
    return file


def _is_blob_of(key: str, sha256: str) -> bool:
    first = blob_key(sha256)
    return key == first or (key.startswith(f"{first}.") and key[len(first) + 1 :].isdecimal())


def _content(manifest: Manifest) -> list[tuple[str, int, str]]:
    return [(file.path, file.size, file.sha256) for file in manifest.files]
