"""``current.checkpoint``, and the same for processes that a task starts and for notebooks: ``metaflow.Checkpoint``."""

import json
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Literal, Self

from metaflow_hf import environment
from metaflow_hf.errors import NotFound, SelectionError
from metaflow_hf.hub.loading import load_manifest
from metaflow_hf.references import CheckpointRef, Reference
from metaflow_hf.store import checkpoints, datastore
from metaflow_hf.store.checkpoints import DEFAULT_NAME, CheckpointKey, CheckpointTask
from metaflow_hf.store.models import find_manifest
from metaflow_hf.store.node_cache import NodeCache
from metaflow_hf.store.objects import ObjectStore, quote_part

logger = logging.getLogger("metaflow_hf.hub")

LoadPolicy = Literal["fresh", "eager", "none"]
LOAD_POLICIES: Final[tuple[LoadPolicy, ...]] = ("fresh", "eager", "none")
READERS: Final = 8


class TaskCheckpoints:
    """Checkpoints of one task, or, without a task, those of all that can be named. References are plain dicts."""

    def __init__(
        self,
        store: ObjectStore,
        who: CheckpointTask | None,
        *,
        directory: Path | None = None,
        temp_dir_root: str | None = None,
    ) -> None:
        self._store = store
        self._who = who
        self._cache = NodeCache.default()
        self._root = None if temp_dir_root is None else Path(temp_dir_root)
        self._directory = directory
        self._own: list[Path] = []
        self._info: dict[str, Any] | None = None
        self._shared: tuple[str, str] | None = None

    @property
    def directory(self) -> str:
        """A directory for the files of a checkpoint: what was loaded last lies there, ``save()`` stores it.

        It goes when the task ends.
        """
        if self._directory is None:
            self._directory = self._new_directory()
        return str(self._directory)

    @property
    def is_loaded(self) -> bool:
        """Whether the task began with a checkpoint in ``directory``."""
        return self._info is not None

    @property
    def info(self) -> dict[str, Any] | None:
        """The reference of the checkpoint that the task began with; ``None`` if it began without."""
        return None if self._info is None else dict(self._info)

    def save(
        self,
        path: str | Path | None = None,
        metadata: Mapping[str, Any] | None = None,
        latest: bool = True,
        name: str = DEFAULT_NAME,
        storage_format: str | None = None,
    ) -> dict[str, Any]:
        """Stores a directory or file (default: ``directory``) as the task's newest checkpoint; returns its reference.

        Bytes that the datastore already holds are not stored again, and it is visible only when complete. With
        ``latest=False`` no retry or later run loads it by itself. ``storage_format`` has no meaning here. Raises
        ``SelectionError`` when there is nothing to save, or outside of a task with ``@checkpoint``.
        """
        if storage_format is not None:
            logger.debug("storage_format=%r has no meaning here and is ignored", storage_format)
        who = self._task("save a checkpoint")
        place = self.directory if path is None else path
        reference = checkpoints.save_checkpoint(
            self._store, place, who, name=name, metadata=metadata, latest=latest
        )
        return reference.to_json()

    def load(self, reference: Reference | Mapping[str, Any] | str, path: str | Path | None = None) -> str:
        """The path of a directory with the files of a checkpoint, by its reference or key.

        Without ``path`` a new one, which is ``directory`` from then on and goes when the task ends; what lay in the
        former one stays there. The files are writable. Raises ``NotFound`` when the checkpoint was deleted.
        """
        key, manifest = find_manifest(self._store, reference)
        target = self._new_directory() if path is None else Path(path)
        load_manifest(self._store, key, manifest, target, cache=self._cache)
        if path is None:
            self._directory = target
            if self._shared is not None:
                self.share(*self._shared)
        return str(target)

    # Above `list`, which hides the built-in type from what follows it in this class.
    def _find(self, task: Any, *, full_namespace: bool) -> list[CheckpointKey]:
        if task is None:
            who = self._task("list checkpoints without task=")
            if full_namespace:
                return [*checkpoints.find_checkpoints(self._store, who.namespace_prefix)]
            found = checkpoints.find_checkpoints(self._store, who.prefix)
            return [key for key in found if key.is_of(who.run, who.task)]
        pathspec = str(getattr(task, "pathspec", task))
        parts = pathspec.split("/")
        if len(parts) != 4 or not all(parts):
            raise SelectionError(f"task={pathspec!r} is no task: write 'Flow/run/step/task' or give a Task.")
        flow, run, step, task_id = parts
        prefix = f"{checkpoints.ROOT}/{quote_part(flow)}/{quote_part(step)}"
        return [key for key in checkpoints.find_checkpoints(self._store, prefix) if key.is_of(run, task_id)]

    def list(
        self,
        name: str | None = None,
        task: Any = None,
        attempt: int | None = None,
        full_namespace: bool = False,
        as_dict: bool = True,
    ) -> list[Any]:
        """References of this task's checkpoints, newest first; of another with ``task`` (a pathspec or ``Task``).

        ``full_namespace`` gives those of every task of this step and namespace, whichever run. ``name`` and
        ``attempt`` choose among them; ``as_dict=False`` gives ``CheckpointRef`` objects.
        """

        def is_wanted(key: CheckpointKey) -> bool:
            return (name is None or key.name == checkpoints.quoted_name(name)) and (
                attempt is None or key.attempt == int(attempt)
            )

        keys = [key for key in self._find(task, full_namespace=full_namespace) if is_wanted(key)]
        keys.sort(key=lambda key: key.order, reverse=True)
        with ThreadPoolExecutor(READERS) as pool:
            found = [reference for reference in pool.map(self._read, keys) if reference is not None]
        if full_namespace:
            # Versions of different branches say nothing about each other.
            found.sort(key=lambda reference: reference.created_on, reverse=True)
        return [reference.to_json() for reference in found] if as_dict else found

    def _read(self, key: CheckpointKey) -> CheckpointRef | None:
        try:
            return checkpoints.checkpoint_reference(self._store, key.key)
        except NotFound:  # deleted since it was listed
            return None

    def begin(self, policy: LoadPolicy) -> CheckpointRef | None:
        """Loads into ``directory`` what the policy says, and returns its reference.

        ``fresh``: the newest of this very task, so that a retry goes on, or of the run that this one resumes;
        ``eager``: else the newest that any run saved in this place; ``none``: nothing.
        """
        if policy == "none":
            return None
        who = self._task("load a checkpoint")
        found = checkpoints.newest_checkpoint(self._store, who, any_run=policy == "eager")
        if found is not None:
            self.load(found)
            if found.pathspec.split("/")[1] == who.origin_run:
                checkpoints.inherit_checkpoint(self._store, found, who)
            self._info = found.to_json()
        return found

    def share(self, ds_type: str, ds_root: str) -> None:
        """Tells the processes that this one starts which checkpoints, in which directory, are theirs too."""
        self._shared = (ds_type, ds_root)
        who = self._task("start processes")
        context = {
            "task": who.to_json(),
            "directory": self.directory,
            "info": self._info,
            "datastore": self._shared,
        }
        environment.set_checkpoint_context(json.dumps(context))

    def close(self) -> None:
        """Removes the directories that were made here; processes started later are told nothing any more."""
        if self._shared is not None:
            self._shared = None
            environment.set_checkpoint_context(None)
        for directory in self._own:
            self._cache.remove_work_dir(directory)
        self._own.clear()

    def _task(self, what: str) -> CheckpointTask:
        if self._who is None:
            raise SelectionError(
                f"only a task with @checkpoint, or a process that it starts, can {what}: elsewhere use "
                "list(task='Flow/run/step/task') and load(reference)."
            )
        return self._who

    def _new_directory(self) -> Path:
        directory = self._cache.new_work_dir("checkpoint", root=self._root)
        self._own.append(directory)
        return directory


class Checkpoint(TaskCheckpoints):
    """Checkpoints outside of the step's own code: in processes that a task with ``@checkpoint`` starts (they save and
    load that task's checkpoints, in its directory), and, to list and load, in notebooks and scripts.

    As a context manager it removes at its end the directories that it made; otherwise ``close()`` does.
    """

    def __init__(self, temp_dir_root: str | None = None, init_dir: bool = False) -> None:
        """``init_dir`` makes ``directory`` a new one instead of the task's."""
        text = environment.checkpoint_context()
        context = None if text is None else json.loads(text)
        if context is not None and not datastore.is_active():
            datastore.activate(*context["datastore"])
        is_shared = context is not None and not init_dir
        super().__init__(
            datastore.configured_store(),
            CheckpointTask(**context["task"]) if context is not None else None,
            directory=Path(context["directory"]) if context is not None and is_shared else None,
            temp_dir_root=temp_dir_root,
        )
        self._info = context["info"] if context is not None and is_shared else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
