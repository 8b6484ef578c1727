"""Downloads as production needs them: many at once, large ones in stages, published whole or not at all."""

import fnmatch
import logging
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from metaflow_hf.errors import IntegrityError, MetaflowHFError, SelectionError, StoreUnavailable
from metaflow_hf.events import DownloadProgress, Event, OnEvent
from metaflow_hf.hub.local import load_snapshot, open_snapshots, snapshot_download
from metaflow_hf.hub.names import Selection
from metaflow_hf.hub.progress import progress_on
from metaflow_hf.hub.request import SnapshotRequest
from metaflow_hf.hub.snapshots import Snapshots
from metaflow_hf.store.blobs import hash_file
from metaflow_hf.store.datastore import configured_store
from metaflow_hf.store.manifests import Manifest
from metaflow_hf.store.models import find_manifest
from metaflow_hf.store.node_cache import NodeCache
from metaflow_hf.store.work_dirs import remove_orphans

if TYPE_CHECKING:
    from huggingface_hub import DryRunFileInfo

logger = logging.getLogger("metaflow_hf.hub")

# What is small, and tells whether the rest is worth its time.
METADATA: Final = ("*.json", "*.md", "*.model", "*.txt", "tokenizer*")
WEIGHTS: Final = (
    *("*.safetensors", "*.bin", "*.gguf", "*.h5", "*.msgpack"),
    *("*.onnx", "*.ot", "*.pt", "*.pth"),
)
DIRECTORY_MODE: Final = 0o755


def download_many(
    repo_ids: Sequence[str], max_workers: int = 3, **arguments: Any
) -> dict[str, dict[str, Any]]:
    """Several repositories at once, each with a result of its own: one that fails does not stop the others.

    ``{repo_id: {"status": "success", "path": …} | {"status": "error", "error": …}}``, in the order asked for.
    ``arguments`` are those of ``snapshot_download`` and hold for all.
    """
    if arguments.get("local_dir") is not None or arguments.get("dry_run"):
        raise SelectionError("download_many takes neither local_dir, which would be shared, nor dry_run.")

    def download(repo_id: str) -> dict[str, Any]:
        try:
            return {"status": "success", "path": snapshot_download(repo_id, **arguments)}
        except MetaflowHFError as error:
            return {"status": "error", "error": str(error)}

    wanted = list(dict.fromkeys(repo_ids))
    with ThreadPoolExecutor(max_workers) as pool:
        return dict(zip(wanted, pool.map(download, wanted), strict=True))


def download_large_model(repo_id: str, **arguments: Any) -> str:
    """The path of a directory with all files, brought in stages: metadata and tokenizer first, then the weights.

    A wrong repository, a refused access or an unusable configuration shows before the first gigabyte. Both stages are
    of one commit; progress is of all bytes together, as a bar on a terminal, else in the log (``metaflow_hf.hub``). Killed in the middle, the next call goes on
    from there. Arguments and errors as ``snapshot_download``.
    """
    request = SnapshotRequest.of(repo_id, **arguments)
    if request.dry_run:
        raise SelectionError("download_large_model cannot rehearse: use snapshot_download(…, dry_run=True).")
    with progress_on(sys.stderr, logger.info) as progress:
        request, plan = _planned(open_snapshots(), request)
        first = tuple(sorted(item.filename for item in plan if is_metadata(item.filename)))
        total = sum(item.file_size or 0 for item in plan)
        logger.info(
            "%s: %d files, %d bytes, %d files of metadata first", repo_id, len(plan), total, len(first)
        )
        stages = _Stages(progress, total)
        if first and len(first) < len(plan):
            patterns = [pattern for path in first for pattern in Selection.file(path).allow or ()]
            metadata = replace(request, selection=Selection.of(patterns), local_dir=None, filename=None)
            open_snapshots(stages).ensure(metadata)
        return str(load_snapshot(request, stages))


class _Stages:
    """Two downloads as one for whoever listens: first a part of the files, then all, of which that part is there."""

    def __init__(self, on_event: OnEvent, total_bytes: int) -> None:
        self._on_event = on_event
        self._total = total_bytes
        self._first: DownloadProgress | None = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, DownloadProgress) and event.total_bytes < self._total:
            self._first = event
            event = replace(event, total_bytes=self._total)
        elif isinstance(event, DownloadProgress) and self._first is not None:
            brought = self._first.done_bytes - self._first.cached_bytes
            event = replace(
                event,
                cached_bytes=max(event.cached_bytes - brought, 0),
                retries=event.retries + self._first.retries,
            )
        self._on_event(event)


def _planned(
    snapshots: Snapshots, request: SnapshotRequest
) -> "tuple[SnapshotRequest, list[DryRunFileInfo]]":
    """The request at one commit, so that a moving branch cannot mix two, and its files."""
    if not request.offline:
        request = replace(request, revision=snapshots.resolve(request).commit_hash)
    return request, snapshots.plan(replace(request, dry_run=True))


def is_metadata(path: str) -> bool:
    """Whether a file is configuration, tokenizer or text rather than weights."""
    name = path.rpartition("/")[2]
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in METADATA)


def production_download(
    repo_id: str,
    target_dir: str | Path,
    *,
    required_files: Sequence[str] | None = None,
    verify: bool = True,
    **arguments: Any,
) -> str:
    """Publishes a repository at ``target_dir`` in one rename: whoever looks there sees all of it or nothing.

    The files are staged beside the target, checked (each against its sha256 with ``verify``; ``required_files`` are
    names or patterns, by default ``config.json`` and weights of any format), then renamed. A target that already
    holds these very files is left as it is, and what a call that was killed left is removed by the next one. Raises ``SelectionError`` when a required file is missing or the target
    holds anything else, and the errors of ``snapshot_download``.
    """
    if arguments.get("local_dir") is not None or arguments.get("dry_run"):
        raise SelectionError(
            "production_download writes to target_dir: it takes neither local_dir nor dry_run."
        )
    target = Path(target_dir).absolute()
    request = SnapshotRequest.of(repo_id, **arguments)
    with progress_on(sys.stderr, logger.info) as progress:
        snapshots = open_snapshots(progress)
        request, plan = _planned(snapshots, request)
        _check_required([item.filename for item in plan], required_files, str(request.repo))
        reference = snapshots.ensure(request)
    _, manifest = find_manifest(configured_store(), reference)
    what = f"{request.repo} at {reference.commit_hash[:12]}"
    if _is_published(target, manifest, what):
        return str(target_dir)
    cache = NodeCache.default()
    remove_orphans(cache.root / "work")  # what a killed call left beside the target
    staging = cache.new_work_dir(target.name, root=target.parent)
    try:
        snapshots.load(reference, staging, token=request.token)
        if verify and not _holds(staging, manifest):
            raise IntegrityError(f"the files staged at {staging} are not those of {what}: try again.")
        staging.chmod(DIRECTORY_MODE)
        _publish(staging, target, manifest, what)
    finally:
        cache.remove_work_dir(staging)
    return str(target_dir)


def _is_published(target: Path, manifest: Manifest, what: str) -> bool:
    """Whether the target holds these very files. Raises ``SelectionError`` when it holds anything else."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    if target.is_dir() and _holds(target, manifest):
        return True
    raise SelectionError(
        f"{target} holds something else than {what}, and what others may be reading is not replaced: publish each "
        "version in a directory of its own and switch a link."
    )


def _publish(staging: Path, target: Path, manifest: Manifest, what: str) -> None:
    try:
        staging.replace(target)
    except OSError as error:
        # Another process may have published in the meantime.
        if not _is_published(target, manifest, what):
            raise StoreUnavailable(f"{what} cannot be published at {target}: {error.strerror}.") from error


def _check_required(paths: Sequence[str], required: Sequence[str] | None, what: str) -> None:
    if required is None:
        missing = [] if "config.json" in paths else ["config.json"]
        if not any(fnmatch.fnmatchcase(path, pattern) for path in paths for pattern in WEIGHTS):
            missing.append("weights (model.safetensors, pytorch_model.bin, …)")
    else:
        missing = [name for name in required if not fnmatch.filter(paths, name)]
    if missing:
        raise SelectionError(
            f"{what} lacks required files: {', '.join(missing)}. It has: {', '.join(sorted(paths)[:8])}"
            f"{' …' if len(paths) > 8 else ''}. Name what you need in required_files."
        )


def _holds(directory: Path, manifest: Manifest) -> bool:
    found = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if not path.is_dir()}
    if found != {file.path for file in manifest.files}:
        return False
    return all(hash_file(directory / file.path) == file.digest for file in manifest.files)
