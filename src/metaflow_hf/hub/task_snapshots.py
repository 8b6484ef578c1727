"""``current.huggingface_hub``: the hub as one task sees it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from metaflow_hf import environment
from metaflow_hf.errors import MetaflowHFError, SelectionError
from metaflow_hf.events import OnEvent, ignore
from metaflow_hf.hub.endpoint import EMBEDDED_KEY, Endpoint
from metaflow_hf.hub.loaded import Directories, Loaded
from metaflow_hf.hub.loadspec import SnapshotEntry
from metaflow_hf.hub.records import RunContext
from metaflow_hf.hub.request import SnapshotRequest
from metaflow_hf.hub.snapshots import Scope, Snapshots
from metaflow_hf.references import SnapshotRef
from metaflow_hf.store.filenames import check_filename
from metaflow_hf.store.models import find_manifest
from metaflow_hf.store.node_cache import NodeCache, Verify
from metaflow_hf.store.objects import ObjectStore

if TYPE_CHECKING:
    from huggingface_hub import DryRunFileInfo

Say = Callable[[str], None]


class TaskSnapshots:
    """Snapshots cached in the flow's datastore; references are plain dicts for ``self`` and ``@model(load=…)``."""

    def __init__(
        self,
        store: ObjectStore,
        *,
        run: RunContext,
        say: Say,
        scope: Scope = "checkpoint",
        verify: Verify = "once",
        temp_dir_root: str | None = None,
        materialize: str | None = None,
        start_embedded: Callable[[], str] | None = None,
        on_event: OnEvent = ignore,
    ) -> None:
        self._store = store
        self._say = say
        self._verify: Verify = verify
        self._materialize = materialize
        self._start_embedded = start_embedded
        self._first_endpoint = environment.hub_endpoint()
        cache = NodeCache.default()
        self._snapshots = Snapshots(store, cache, run=run, scope=scope, on_event=on_event)
        self._directories = Directories(cache, temp_dir_root)
        self._loaded = Loaded("current.huggingface_hub")

    @property
    def loaded(self) -> Loaded:
        """Paths of what ``@huggingface_hub(load=…)`` loaded, by the names used there."""
        return self._loaded

    def connect(self, endpoint: str | None) -> str:
        """Makes ``endpoint`` the hub of this task, for other libraries too, and returns its address.

        ``embedded`` starts the demo's own hub in this process; ``None`` is what the environment said at first.
        """
        if endpoint == EMBEDDED_KEY and self._start_embedded is not None:
            self._start_embedded()
        else:
            environment.use_hub(Endpoint.of(endpoint or self._first_endpoint).url)
        return Endpoint.of().url

    @overload
    def snapshot_download(
        self, repo_id: str, *, dry_run: Literal[False] = False, **arguments: Any
    ) -> dict[str, Any]: ...

    @overload
    def snapshot_download(
        self, repo_id: str, *, dry_run: Literal[True], **arguments: Any
    ) -> "list[DryRunFileInfo]": ...

    def snapshot_download(
        self, repo_id: str, *, dry_run: bool = False, **arguments: Any
    ) -> "dict[str, Any] | list[DryRunFileInfo]":
        """A reference to the repository's files, downloaded and stored only if no one ever did.

        Takes huggingface_hub's arguments; ``endpoint="embedded"`` is the demo's own hub, started on demand. Into
        ``local_dir`` the files are written as well. With ``dry_run`` nothing is downloaded, stored or recorded: the
        answer is huggingface_hub's list of what would be. Raises the errors of ``metaflow_hf.errors``, which are
        huggingface_hub's classes too.
        """
        request = self._request(repo_id, {**arguments, "dry_run": dry_run})
        if dry_run:
            return self._snapshots.plan(request)
        reference = self._snapshots.ensure(request)
        if request.local_dir is not None:
            self._write(reference, request.local_dir, request)
        return reference.to_json()

    @overload
    def hf_hub_download(
        self,
        repo_id: str,
        filename: str,
        *,
        subfolder: str | None = None,
        dry_run: Literal[False] = False,
        **arguments: Any,
    ) -> dict[str, Any]: ...

    @overload
    def hf_hub_download(
        self,
        repo_id: str,
        filename: str,
        *,
        subfolder: str | None = None,
        dry_run: Literal[True],
        **arguments: Any,
    ) -> "DryRunFileInfo": ...

    def hf_hub_download(
        self,
        repo_id: str,
        filename: str,
        *,
        subfolder: str | None = None,
        dry_run: bool = False,
        **arguments: Any,
    ) -> "dict[str, Any] | DryRunFileInfo":
        """A reference to a single file of a repository; otherwise as ``snapshot_download``."""
        path = check_filename(f"{subfolder}/{filename}" if subfolder else filename)
        if dry_run:
            request = self._request(repo_id, {**arguments, "filename": path, "dry_run": True})
            return self._snapshots.plan(request)[0]
        reference: dict[str, Any] = self.snapshot_download(repo_id, filename=path, **arguments)
        return reference

    def download_many(
        self, repo_ids: Sequence[str], max_workers: int = 3, **arguments: Any
    ) -> dict[str, dict[str, Any]]:
        """Several repositories at once, each with a result of its own: one that fails does not stop the others.

        ``{repo_id: {"status": "success", "reference": …} | {"status": "error", "error": …}}``.
        """
        if arguments.get("dry_run"):
            raise SelectionError("download_many cannot rehearse: use snapshot_download(…, dry_run=True).")

        def download(repo_id: str) -> dict[str, Any]:
            try:
                return {"status": "success", "reference": self.snapshot_download(repo_id, **arguments)}
            except MetaflowHFError as error:
                return {"status": "error", "error": str(error)}

        with ThreadPoolExecutor(max_workers) as pool:
            return dict(zip(repo_ids, pool.map(download, repo_ids), strict=True))

    @contextmanager
    def load(self, repo_id: str, path: str | None = None, **arguments: Any) -> Iterator[str]:
        """The repository's files as a directory for the length of a ``with`` block.

        In ``path`` they stay; without it the directory goes when the block ends.
        """
        request = self._request(repo_id, arguments)
        _refuse_dry_run(request)
        reference = self._snapshots.ensure(request)
        if path is not None:
            self._write(reference, path, request)
            yield path
            return
        own = self._directories.new(request.repo.key)
        self._write(reference, str(own), request, is_own=True)
        try:
            yield str(own)
        finally:
            self._directories.remove(own)

    def load_entries(self, entries: Sequence[SnapshotEntry]) -> None:
        """Loads what the decorator asks for, each entry under its name in ``loaded``."""
        for entry in entries:
            request = self._request(entry.repo_id, entry.arguments)
            _refuse_dry_run(request)
            reference = self._snapshots.ensure(request)
            path = entry.path or str(self._directories.new(request.repo.key))
            self._write(reference, path, request, is_own=not entry.path)
            self._loaded._add(entry.name, path, reference.to_json(), repo_id=entry.repo_id)  # noqa: SLF001

    def close(self) -> None:
        """Removes the task's own directories."""
        self._directories.close()

    def _request(self, repo_id: str, arguments: Mapping[str, Any]) -> SnapshotRequest:
        if arguments.get("endpoint") == EMBEDDED_KEY and self._start_embedded is not None:
            self._start_embedded()
        return SnapshotRequest.of(repo_id, **arguments)

    def _write(
        self, reference: SnapshotRef, path: str, request: SnapshotRequest, *, is_own: bool = False
    ) -> None:
        target = Path(path)
        _, manifest = find_manifest(self._store, reference)
        what = f"{request.repo} at {request.revision!r}"
        with self._directories.claim(target, (file.path for file in manifest.files), what):
            shown = "./" if path == "." else path  # before a full stop
            self._say(f"Loading model from datastore to {shown}. Model being loaded: {reference.key}")
            self._snapshots.load(
                reference,
                target,
                verify=self._verify,
                link_large=is_own,
                materialize_mode=self._materialize,
                token=request.token,
            )


def _refuse_dry_run(request: SnapshotRequest) -> None:
    if request.dry_run:
        raise SelectionError(
            f"{request.repo} cannot be loaded with dry_run, which downloads nothing: use "
            "current.huggingface_hub.snapshot_download(…, dry_run=True)."
        )
