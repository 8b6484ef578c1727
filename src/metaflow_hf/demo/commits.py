"""Immutable commits with git's own hashes.

Blob, tree and commit objects are hashed as git does, with a fixed author and clock, so the same files committed
in the same order have the same 40-hex hashes on every machine, and a client may check a small file by its git
sha1 as it would on the real hub. A large or binary file is hashed as its git-LFS pointer, also as there.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import PurePosixPath

FIRST_COMMIT = datetime(2024, 1, 1, tzinfo=UTC)  # commits are a minute apart: hashes need no real clock
LFS_OVER_BYTES = 1 << 20
LFS_SUFFIXES = frozenset(
    {".arrow", ".bin", ".bz2", ".gz", ".h5", ".jpg", ".model", ".msgpack", ".npy", ".npz", ".onnx", ".ot"}
    | {
        ".parquet",
        ".pickle",
        ".pkl",
        ".png",
        ".pt",
        ".pth",
        ".safetensors",
        ".tar",
        ".wav",
        ".xz",
        ".zip",
        ".zst",
    }
)
_AUTHOR = "metaflow-hf <demo@localhost>"


def _git_sha1(kind: str, body: bytes) -> str:
    return hashlib.sha1(f"{kind} {len(body)}\0".encode() + body, usedforsecurity=False).hexdigest()


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of one commit. ``oid`` is the git sha1 (of the pointer, when the file is stored by LFS)."""

    path: str
    data: bytes = field(repr=False)
    is_lfs: bool
    oid: str
    sha256: str
    pointer_size: int

    @classmethod
    def of(cls, path: str, data: bytes) -> "HubFile":
        sha256 = hashlib.sha256(data).hexdigest()
        is_lfs = cls.goes_by_lfs(path, len(data))
        pointer = (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(data)}\n".encode()
        )
        oid = _git_sha1("blob", pointer if is_lfs else data)
        return cls(path, data, is_lfs, oid, sha256, len(pointer))

    @staticmethod
    def goes_by_lfs(path: str, size: int) -> bool:
        """Large files and those of binary formats are stored by LFS; empty files never are."""
        return size > LFS_OVER_BYTES or (size > 0 and PurePosixPath(path).suffix in LFS_SUFFIXES)

    @property
    def size(self) -> int:
        return len(self.data)

    @property
    def etag(self) -> str:
        """What the hub sends as ETag: the sha256 of an LFS file, the git sha1 of any other."""
        return self.sha256 if self.is_lfs else self.oid


@dataclass(frozen=True, slots=True)
class Commit:
    """An immutable state of a repository. ``trees`` maps each folder (``""`` is the root) to its git sha1."""

    sha: str
    message: str
    created_at: datetime
    parent: str | None
    files: Mapping[str, HubFile] = field(repr=False)
    trees: Mapping[str, str] = field(repr=False)


def _tree_hashes(files: Mapping[str, HubFile]) -> dict[str, str]:
    """Git's tree hash of every folder, from the leaves up."""
    children: dict[str, dict[str, tuple[str, str]]] = {"": {}}
    for path, file in files.items():
        folder, _, name = path.rpartition("/")
        children.setdefault(folder, {})[name] = ("100644", file.oid)
        while folder:
            folder = folder.rpartition("/")[0]
            children.setdefault(folder, {})
    hashes: dict[str, str] = {}
    for folder in sorted(children, key=lambda f: (-f.count("/"), f == "", f)):
        entries = children[folder]
        # git orders a folder as if its name ended with a slash
        ordered = sorted(entries, key=lambda n: n + "/" if entries[n][0] == "40000" else n)
        body = b"".join(f"{entries[n][0]} {n}\0".encode() + bytes.fromhex(entries[n][1]) for n in ordered)
        hashes[folder] = _git_sha1("tree", body)
        if folder:
            parent, _, name = folder.rpartition("/")
            children[parent][name] = ("40000", hashes[folder])
    return hashes


def make_commit(files: Mapping[str, HubFile], parent: Commit | None, message: str) -> Commit:
    trees = _tree_hashes(files)
    created_at = parent.created_at + timedelta(minutes=1) if parent else FIRST_COMMIT
    stamp = f"{_AUTHOR} {int(created_at.timestamp())} +0000"
    lines = [f"tree {trees['']}", *([f"parent {parent.sha}"] if parent else [])]
    body = "\n".join([*lines, f"author {stamp}", f"committer {stamp}", "", message, ""])
    return Commit(
        sha=_git_sha1("commit", body.encode()),
        message=message,
        created_at=created_at,
        parent=parent.sha if parent else None,
        files=dict(sorted(files.items())),
        trees=trees,
    )
