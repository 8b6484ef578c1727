"""What this node has already loaded: blobs by content, shared by all its tasks, so that none is fetched twice.

    <root>/blobs/<ab>/<sha256>            the bytes, read-only, named by their content
    <root>/blobs/<ab>/<sha256>.verified   size, mtime, inode and boot of the file when its sha256 was right
    <root>/staging/…                      unfinished downloads, one directory per commit
    <root>/work/…                         directories of running tasks, and which process each belongs to
    <root>/trees/…                        directories of snapshots that scripts asked for

Read-only does not bind root, and a crash may lose what was not yet on disk: a file counts as verified only while
its size, mtime, inode and the machine's boot are those of the record. Anything here may be deleted at any time.
"""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from metaflow_hf import environment
from metaflow_hf.errors import StoreUnavailable
from metaflow_hf.store import node_claims, work_dirs
from metaflow_hf.store.blobs import download_blob, hash_file
from metaflow_hf.store.manifests import ManifestFile
from metaflow_hf.store.objects import Digest, ObjectStore, new_nonce
from metaflow_hf.store.staging import own_directory

logger = logging.getLogger("metaflow_hf.store")

Verify = Literal["always", "once", "never"]
READ_ONLY: Final = 0o444


@dataclass(frozen=True, slots=True)
class _Seen:
    """What makes a verified file recognisable without reading it."""

    size: int
    mtime_ns: int
    inode: int
    boot: str

    @classmethod
    def of(cls, path: Path) -> "_Seen":
        info = path.stat()
        return cls(info.st_size, info.st_mtime_ns, info.st_ino, work_dirs.boot_id())


class NodeCache:
    """The cache below one directory. Safe for many threads and processes: every file appears by a rename, and is
    brought by one of those who want it at the same time.

    Raises ``StoreUnavailable`` when the directory cannot be made, or belongs to another user.
    """

    def __init__(self, root: Path, *, stall_seconds: float = node_claims.STALL_SECONDS) -> None:
        """``stall_seconds``: after how long without a new byte another task's download is no longer waited for."""
        self.root = root
        self._stall_seconds = stall_seconds
        try:
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
            owner = root.stat().st_uid
        except OSError as error:
            raise StoreUnavailable(
                f"the node cache {root} cannot be used: {error.strerror or error}. Set METAFLOW_HF_CACHE to a "
                "directory that you may write."
            ) from error
        if owner != os.getuid():
            raise StoreUnavailable(
                f"the node cache {root} belongs to another user (uid {owner}), who could change what you load: set "
                "METAFLOW_HF_CACHE to a directory of your own."
            )

    @classmethod
    def default(cls) -> "NodeCache":
        """The cache at ``METAFLOW_HF_CACHE``, else in the user's cache directory."""
        return cls(environment.node_cache_root())

    def blob_path(self, sha256: str) -> Path:
        """Where the bytes with this sha256 lie, if they do."""
        return self.root / "blobs" / sha256[:2] / sha256

    @contextmanager
    def staging(self, name: str) -> Iterator[Path]:
        """The directory of one unfinished download, for this one alone while the context lasts.

        It stays when the process dies, so that the next resumes; who comes while it is in use gets another.
        """
        with ExitStack() as stack:
            with self._explained():
                directory = stack.enter_context(own_directory(self.root / "staging" / name))
            yield directory

    def new_work_dir(self, label: str, *, root: Path | None = None) -> Path:
        """A fresh private directory for one task, by default on the cache's own file system (for links)."""
        with self._explained(root):
            return work_dirs.create(self.root / "work", label, parent=root)

    def remove_work_dir(self, directory: Path) -> None:
        """Removes a directory that ``new_work_dir`` made."""
        work_dirs.remove(self.root / "work", directory)

    def fetch(self, store: ObjectStore, file: ManifestFile, *, verify: Verify = "once") -> Path:
        """The path of the file's bytes on this node; read-only for the caller.

        Size is checked always; sha256 when the bytes are brought here (``once``), at each call (``always``) or not
        at all (``never``). What no longer verifies is fetched again. Raises ``IntegrityError`` when the stored
        bytes themselves are wrong, ``NotFound`` when they are gone.
        """
        path = self.blob_path(file.sha256)

        def is_here() -> bool:
            return self._holds(path, file.digest, verify)

        with self._explained():
            if is_here():
                with suppress(OSError):  # only how recently it was used
                    os.utime(_record(path))
                return path
            path.parent.mkdir(parents=True, exist_ok=True)
            with node_claims.bringing(path, done=is_here, stall_seconds=self._stall_seconds) as is_ours:
                return path if not is_ours or is_here() else self._bring(store, file, path, verify)

    def _bring(self, store: ObjectStore, file: ManifestFile, path: Path, verify: Verify) -> Path:
        part = path.with_name(f"{path.name}.{new_nonce()[:8]}.part")
        try:
            download_blob(store, file.blob, part, file.digest, verify=verify != "never")
            return self._place(part, path, record=verify != "never")
        finally:
            part.unlink(missing_ok=True)

    def adopt(self, source: Path, digest: Digest) -> Path:
        """Takes over a file whose bytes were just verified as ``digest``; ``source`` is gone afterwards."""
        path = self.blob_path(digest.sha256)
        with self._explained():
            path.parent.mkdir(parents=True, exist_ok=True)
            return self._place(source, path, record=True)

    def forget(self, sha256: str) -> None:
        """Drops the bytes from this node; who has them linked keeps them."""
        path = self.blob_path(sha256)
        _record(path).unlink(missing_ok=True)
        path.unlink(missing_ok=True)

    @contextmanager
    def _explained(self, root: Path | None = None) -> Iterator[None]:
        """Says which disk is full or may not be written; what another process took away passes unchanged."""
        try:
            yield
        except OSError as error:
            if isinstance(error, (StoreUnavailable, FileNotFoundError)):
                raise
            place = f"the node cache {self.root}" if root is None else str(root)
            remedy = "set METAFLOW_HF_CACHE to" if root is None else "choose as temp_dir_root"
            raise StoreUnavailable(
                f"{place} cannot be written: {error.strerror or error}. Make room there, or {remedy} a directory on a "
                "larger disk."
            ) from error

    def _holds(self, path: Path, digest: Digest, verify: Verify) -> bool:
        try:
            seen = _Seen.of(path)
        except FileNotFoundError:
            return False
        if seen.size == digest.size and (verify == "never" or (verify == "once" and seen == _recorded(path))):
            return True
        if seen.size == digest.size and hash_file(path) == digest:
            self._write_record(path, seen)
            return True
        logger.warning(
            "%s on this node was changed after it had been verified; it is fetched again", path.name
        )
        self.forget(digest.sha256)
        return False

    def _place(self, source: Path, path: Path, *, record: bool) -> Path:
        source.chmod(READ_ONLY)
        # Of this very file, which a rename does not change: at its place another task's may lie a moment later.
        seen = _Seen.of(source)
        _record(path).unlink(missing_ok=True)
        source.replace(path)
        if record:
            self._write_record(path, seen)
        return path

    def _write_record(self, path: Path, seen: _Seen) -> None:
        record = _record(path)
        part = record.with_name(f"{record.name}.{new_nonce()[:8]}.part")
        try:
            part.write_text(json.dumps([seen.size, seen.mtime_ns, seen.inode, seen.boot]))
            part.replace(record)
        except OSError as error:
            # The bytes are here and right; without the record they are only read once more.
            logger.warning("%s cannot be written: %s", record, error.strerror or error)
            part.unlink(missing_ok=True)


def _record(path: Path) -> Path:
    return path.with_name(f"{path.name}.verified")


def _recorded(path: Path) -> _Seen | None:
    try:
        size, mtime_ns, inode, boot = json.loads(_record(path).read_text())
    except (OSError, ValueError):
        return None
    return _Seen(size, mtime_ns, inode, boot)
