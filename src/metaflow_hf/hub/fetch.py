"""A snapshot that is not cached yet: list it, bring what no one ever brought, publish the manifest.

What the store holds already, from any repository, revision or flow, is not downloaded: large files are known by
the sha256 in the hub's tree, small ones by git's sha1 within their own repository.
"""

import hashlib
import logging
import shutil
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Final

from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

from metaflow_hf.errors import IntegrityError, NotFound, SelectionError, StoreUnavailable
from metaflow_hf.events import OnEvent
from metaflow_hf.hub.arrivals import Arrivals
from metaflow_hf.hub.client import HubClient, RemoteFile
from metaflow_hf.hub.errors import EntryNotFoundError
from metaflow_hf.hub.request import SnapshotRequest
from metaflow_hf.hub.tally import Tally
from metaflow_hf.hub.transfer import bring_file, check_file
from metaflow_hf.store.blobs import Blobs
from metaflow_hf.store.filenames import check_filenames
from metaflow_hf.store.manifests import Manifest, ManifestFile, condemned_files, publish, read_manifest
from metaflow_hf.store.node_cache import NodeCache
from metaflow_hf.store.objects import Digest, ObjectStore

logger = logging.getLogger("metaflow_hf.hub")

# How many earlier manifests of a repository are read for small files that did not change.
EARLIER_MANIFESTS: Final = 4
# How often wrong bytes are asked for again.
TRIES: Final = 3


def select_files(client: HubClient, request: SnapshotRequest, commit_hash: str) -> list[RemoteFile]:
    """The files of the commit that the patterns choose.

    Raises ``SelectionError`` when they choose none, or one whose name may not be written to a disk.
    """
    files = client.tree(request.repo, commit_hash)
    allow, ignore = request.selection.allow, request.selection.ignore
    chosen = list(
        filter_repo_objects(
            files,
            allow_patterns=None if allow is None else list(allow),
            ignore_patterns=None if ignore is None else list(ignore),
            key=lambda file: file.path,
        )
    )
    if not chosen and request.filename is not None:
        raise EntryNotFoundError(
            f"{request.repo} at {commit_hash[:12]} on {request.endpoint} has no file {request.filename!r}."
        )
    if not chosen:
        names = ", ".join(sorted(file.path for file in files)[:8]) or "none"
        raise SelectionError(
            f"no file of {request.repo} at {commit_hash[:12]} matches {request.selection}. Files there: {names}"
            f"{' …' if len(files) > 8 else ''}."
        )
    check_filenames(file.path for file in chosen)
    return chosen


class Fetcher:
    """One download of one snapshot under a lease: what is missing goes hub -> staging -> blobs -> manifest."""

    def __init__(
        self,
        store: ObjectStore,
        cache: NodeCache,
        client: HubClient,
        request: SnapshotRequest,
        on_event: OnEvent,
    ) -> None:
        self._store = store
        self._cache = cache
        self._client = client
        self._request = request
        self._on_event = on_event

    def fetch(self, commit_hash: str, manifest_key: str) -> Manifest:
        """Stores all chosen files and then their manifest, which readers see only when it is complete.

        A killed call leaves its finished blobs in the store and its unfinished files in the node's staging
        directory; the next call goes on from both.
        """
        request = self._request
        files = select_files(self._client, request, commit_hash)
        arrivals = Arrivals(self._store, self._content(commit_hash))
        about = {
            "type": "snapshot",
            "repo_id": request.repo.repo_id,
            "repo_type": request.repo.repo_type,
            "commit_hash": commit_hash,
            **request.selection.to_json(),
        }
        with self._cache.staging(self._content(commit_hash)) as staging:
            while True:
                stored = self._store_files(files, commit_hash, staging, arrivals)
                manifest = publish(self._store, manifest_key, Manifest(files=stored, about=about))
                if not condemned_files(self._store, manifest):
                    break
                # A collection condemned a blob between our look and our manifest: the next generation is safe.
                self._store.delete(manifest_key)
            shutil.rmtree(staging, ignore_errors=True)
        arrivals.clear(manifest)
        return manifest

    def plan(self, commit_hash: str) -> list[tuple[RemoteFile, bool]]:
        """The chosen files, and whether the store holds each already; changes nothing."""
        files = select_files(self._client, self._request, commit_hash)
        arrived = Arrivals(self._store, self._content(commit_hash)).read()
        found = self._find(files, Blobs(self._store), arrived)
        return [(file, entry is not None) for file, entry in zip(files, found, strict=True)]

    def fetch_again(self, commit_hash: str, file: ManifestFile) -> None:
        """Heals one damaged or missing blob with bytes from the hub, checked against the manifest."""
        remote = RemoteFile(file.path, file.size, file.oid or "", None if file.oid else file.sha256)
        blobs = Blobs(self._store)

        def heal(path: Path, digest: Digest) -> str:
            return blobs.heal(path, file.blob, digest)

        self._cache.forget(file.sha256)
        tally = Tally(file.path, file.size, self._on_event)
        with self._cache.staging(self._content(commit_hash)) as staging:
            self._bring_file(remote, commit_hash, staging, heal, tally)

    def _store_files(
        self, files: list[RemoteFile], commit_hash: str, staging: Path, arrivals: Arrivals
    ) -> tuple[ManifestFile, ...]:
        blobs = Blobs(self._store)
        found: list[ManifestFile | None] = [None] * len(files)
        if not self._request.force_download:
            found = self._find(files, blobs, arrivals.read())
        missing = [file for file, entry in zip(files, found, strict=True) if entry is None]
        logger.info(
            "%s: %d of %d files are stored already", self._request.repo, len(files) - len(missing), len(files)
        )
        tally = Tally(
            f"{self._request.repo.repo_id}@{commit_hash[:12]}",
            sum(file.size for file in files),
            self._on_event,
            cached_bytes=sum(entry.size for entry in found if entry is not None),
        )
        tally.tell()
        brought = self._bring(missing, commit_hash, staging, blobs, tally, arrivals) if missing else []
        return (*(entry for entry in found if entry is not None), *brought)

    def _find(
        self, files: list[RemoteFile], blobs: Blobs, arrived: list[ManifestFile]
    ) -> list[ManifestFile | None]:
        """For each file its entry in a manifest, if the store holds its bytes."""
        known = self._known_small_files(arrived)

        def find(file: RemoteFile) -> ManifestFile | None:
            digest = Digest(file.sha256, file.size) if file.sha256 else known.get((file.oid, file.size))
            blob = blobs.find(digest) if digest else None
            return _entry(file, digest, blob) if digest and blob else None

        with ThreadPoolExecutor(self._request.max_workers) as pool:
            return list(pool.map(find, files))

    def _bring(
        self,
        missing: list[RemoteFile],
        commit_hash: str,
        staging: Path,
        blobs: Blobs,
        tally: Tally,
        arrivals: Arrivals,
    ) -> list[ManifestFile]:
        total = sum(file.size for file in missing)
        repo = self._request.repo
        _check_space(staging, total)
        logger.info(
            "downloading %d files, %d bytes, of %s from %s", len(missing), total, repo, self._client.endpoint
        )

        failures: list[BaseException] = []

        def bring(file: RemoteFile) -> ManifestFile:
            def store(path: Path, digest: Digest) -> str:
                if file.sha256 is None:
                    arrivals.add(file.path, file.oid, digest)
                return blobs.replace(path, digest)

            try:
                return self._bring_file(file, commit_hash, staging, store, tally)
            except BaseException as error:
                # One failure ends it: what has not begun need not begin, what runs stops and is resumed later.
                failures.append(error)
                tally.stop()
                raise

        with ThreadPoolExecutor(self._request.max_workers) as pool:
            futures = [pool.submit(bring, file) for file in missing]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
                if failures:
                    raise failures[0]
                return [future.result() for future in futures]
            except (KeyboardInterrupt, SystemExit):
                logger.warning("interrupted at %s; run again on this machine to resume", tally)
                raise
            finally:
                tally.stop()
                for future in futures:
                    future.cancel()

    def _bring_file(
        self,
        file: RemoteFile,
        commit_hash: str,
        staging: Path,
        store: Callable[[Path, Digest], str],
        tally: Tally,
    ) -> ManifestFile:
        place = staging / hashlib.sha256(file.path.encode()).hexdigest()[:32]
        for attempt in range(1, TRIES + 1):
            try:
                bring_file(
                    self._client,
                    self._request.repo,
                    commit_hash,
                    file,
                    place,
                    progress=tally.file(file.path),
                    use_hub_cache=attempt == 1,
                )
                digest = check_file(place, file)
                blob = store(place, digest)
            except IntegrityError as error:
                place.unlink(missing_ok=True)
                logger.warning("asking again for %r (try %d of %d): %s", file.path, attempt, TRIES, error)
            else:
                self._cache.adopt(place, digest)
                return _entry(file, digest, blob)
        raise IntegrityError(
            f"{file.path!r} of {self._request.repo} at {commit_hash[:12]} arrived damaged {TRIES} times from "
            f"{self._client.endpoint}: the hub, a mirror or a proxy sends wrong bytes. Nothing of it was stored; check "
            "HF_ENDPOINT and try again later."
        )

    def _content(self, commit_hash: str) -> str:
        return f"{self._request.endpoint.key}/{self._request.repo.key}/{commit_hash}"

    def _known_small_files(self, arrived: list[ManifestFile]) -> dict[tuple[str, int], Digest]:
        """Git's sha1 and size -> digest: what has arrived, and the newest manifests of this repository on this hub."""
        prefix = f"manifests/{self._request.endpoint.key}/{self._request.repo.key}"
        newest = sorted(self._store.list(prefix), key=lambda info: info.last_modified)[-EARLIER_MANIFESTS:]
        stored: list[ManifestFile] = []
        for info in newest:
            try:
                stored += read_manifest(self._store, info.key).files
            except NotFound:  # deleted since it was listed
                continue
            except IntegrityError as error:
                logger.warning("%s What it names is downloaded again.", error)
        return {(file.oid, file.size): file.digest for file in (*stored, *arrived) if file.oid}


def _entry(file: RemoteFile, digest: Digest, blob: str) -> ManifestFile:
    oid = file.oid if file.sha256 is None else None
    return ManifestFile(path=file.path, size=digest.size, sha256=digest.sha256, blob=blob, oid=oid)


def _check_space(directory: Path, size: int) -> None:
    free = shutil.disk_usage(directory).free
    if size > free:
        raise StoreUnavailable(
            f"the download needs {size} bytes and {directory} has {free} free: make room, or set METAFLOW_HF_CACHE to a "
            "larger disk."
        )
