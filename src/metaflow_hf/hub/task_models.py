"""``current.model``: the models, snapshots and checkpoints that one task loads and saves."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from metaflow_hf.errors import MetaflowHFError, SelectionError
from metaflow_hf.hub.loaded import Directories, Loaded
from metaflow_hf.hub.loading import load_manifest
from metaflow_hf.hub.loadspec import ModelEntry
from metaflow_hf.hub.records import RunContext
from metaflow_hf.references import Reference
from metaflow_hf.store.models import find_manifest, save_directory
from metaflow_hf.store.node_cache import NodeCache, Verify
from metaflow_hf.store.objects import ObjectStore, quote_part

logger = logging.getLogger("metaflow_hf.hub")

Say = Callable[[str], None]
MISSING: Final = object()
KEY_PREFIXES: Final = ("snapshots/", "models/", "checkpoints/", "manifests/")


class TaskModels:
    """Loads by reference or key, from any flow; saves under the task that runs."""

    def __init__(
        self,
        store: ObjectStore,
        *,
        run: RunContext,
        say: Say,
        verify: Verify = "once",
        temp_dir_root: str | None = None,
        materialize: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._run = run
        self._say = say
        self._verify: Verify = verify
        self._materialize = materialize
        self._clock = clock
        self._cache = NodeCache.default()
        self._directories = Directories(self._cache, temp_dir_root)
        self._loaded = Loaded("current.model")

    @property
    def loaded(self) -> Loaded:
        """Paths of what ``@model(load=…)`` loaded, by the names used there."""
        return self._loaded

    def save(
        self,
        path: str | Path,
        label: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        storage_format: str | None = None,
    ) -> dict[str, Any]:
        """Stores a directory or file as a model of this task and returns its reference, a plain dict.

        Bytes that the datastore already holds, from whatever flow, are not stored again. ``storage_format`` is
        accepted for code written for other extensions and has no meaning here. Raises ``SelectionError`` when there
        is nothing at ``path``.
        """
        if storage_format is not None:
            logger.debug("storage_format=%r has no meaning here and is ignored", storage_format)
        reference = save_directory(
            self._store,
            path,
            flow=self._run.flow,
            run=self._run.run,
            step=self._run.step,
            task=self._run.task,
            label="model" if label is None else label,
            metadata=metadata,
            pathspec=self._run.pathspec,
        )
        return reference.to_json()

    def load(self, reference: Reference | Mapping[str, Any] | str, path: str | None = None) -> str:
        """The path of a directory with the files of a reference, a key, or a ``ModelRef``-like object.

        Without ``path`` a directory of the task's own, which goes when the task ends; with it real, writable files,
        beside whatever lies there. Raises ``SelectionError`` where they would mix with those of another reference that
        this task loaded into ``path``.
        """
        return self._load(reference, path)

    def load_entries(
        self, entries: Sequence[ModelEntry], find: Callable[[str], Any], *, best_effort: bool = False
    ) -> None:
        """Loads the artifacts that the decorator names; ``find`` gives an artifact's value, or ``MISSING``.

        With ``best_effort`` what cannot be loaded is said and left out; otherwise it raises.
        """
        for entry in entries:
            try:
                self._load_entry(entry, find)
            except MetaflowHFError as error:
                if not best_effort:
                    raise
                self._say(f"Artifact `{entry.name}` was not loaded: {error}")

    def close(self) -> None:
        """Removes the task's own directories."""
        self._directories.close()

    def _load_entry(self, entry: ModelEntry, find: Callable[[str], Any]) -> None:
        value = find(entry.name)
        if value is MISSING and entry.name.startswith(KEY_PREFIXES):
            value = entry.name
        if value is MISSING:
            raise SelectionError(
                f"@model(load=…) names {entry.name!r}, but this step has no such artifact and it is no key: assign "
                f"self.{entry.name} = current.huggingface_hub.snapshot_download(…) or current.model.save(…) in an "
                "earlier step."
            )
        reference = _as_reference(value, entry.name)
        key, kind = _describe(reference)
        began = self._clock()
        self._say(f"Loading Artifact with name `{entry.name}` [type:{kind}] with key: {key}")
        path = self._load(reference, entry.path, name=entry.name)
        self._say(f"Loaded artifact `{entry.name}[type:{kind}]` in {self._clock() - began:.2f} seconds")
        info = dict(reference) if isinstance(reference, Mapping) else {"key": key, "type": kind}
        self._loaded._add(entry.name, path, info)  # noqa: SLF001

    def _load(
        self, reference: Reference | Mapping[str, Any] | str, path: str | None, *, name: str | None = None
    ) -> str:
        key, manifest = find_manifest(self._store, reference)
        what = key if name is None else f"artifact {name!r}"
        label = str(manifest.about.get("label") or manifest.about.get("repo_id") or "model")
        target = Path(path) if path is not None else self._directories.new(quote_part(label)[:60])
        with self._directories.claim(target, (file.path for file in manifest.files), what):
            load_manifest(
                self._store,
                key,
                manifest,
                target,
                cache=self._cache,
                verify=self._verify,
                link_large=path is None,
                materialize_mode=self._materialize,
            )
        return str(target) if path is None else path


def _as_reference(value: Any, name: str) -> Mapping[str, Any] | str:
    if isinstance(value, Reference):
        return value.to_json()
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return dict(value)
    raise SelectionError(
        f"the artifact {name!r} is a {type(value).__name__}, not a reference: store what snapshot_download, "
        "current.model.save or a training run returned."
    )


def _describe(reference: Mapping[str, Any] | str) -> tuple[str, str]:
    if isinstance(reference, str):
        return reference, reference.partition("/")[0].removesuffix("s")
    return str(reference.get("key")), str(reference.get("type"))
