"""Checkpoints in the store: numbered per task identifier, so that a retry, a resumed or a later run finds the newest.

    checkpoints/<flow>/<step>/<namespace>/<task identifier>/<version>--<run>--<task>--<attempt>--<name>.json

The identifier says which branch of a foreach a task is, in every run: two branches over equal values share it.
Tasks that save at the same moment may get the same version; both checkpoints are kept, in the order of their keys.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Self

from metaflow_hf.errors import NotFound, SelectionError
from metaflow_hf.references import CheckpointRef
from metaflow_hf.store.manifests import Manifest, condemned_files, read_manifest
from metaflow_hf.store.models import check_metadata, files_to_save, store_files
from metaflow_hf.store.objects import ObjectStore, quote_part

ROOT: Final = "checkpoints"
DEFAULT_NAME: Final = "mfchckpt"
MAX_NAME_BYTES: Final = 120
_DIGITS: Final = 8
_SEPARATOR: Final = "--"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointTask:
    """One attempt of one task, and under which identifier its checkpoints are numbered.

    ``iteration`` counts the tasks of a step that comes back to itself, which share the identifier.
    """

    flow: str
    run: str
    step: str
    task: str
    attempt: int = 0
    namespace: str = ""
    identifier: str = ""
    origin_run: str | None = None
    iteration: int = 0

    @property
    def pathspec(self) -> str:
        return f"{self.flow}/{self.run}/{self.step}/{self.task}"

    @property
    def namespace_prefix(self) -> str:
        """Where the checkpoints of all tasks of this step and namespace are."""
        namespace = quote_part(self.namespace, empty="_global")
        return f"{ROOT}/{quote_part(self.flow)}/{quote_part(self.step)}/{namespace}"

    @property
    def prefix(self) -> str:
        """Where the checkpoints of this identifier are."""
        return f"{self.namespace_prefix}/{quote_part(self.identifier, empty='_single')}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class CheckpointKey:
    """A key's parts as they are written there, that is, quoted."""

    key: str
    version: int
    run: str
    task: str
    attempt: int
    name: str

    @classmethod
    def parse(cls, key: str) -> Self | None:
        """``None`` for a key of something else."""
        parts = key.rpartition("/")[2].removesuffix(".json").split(_SEPARATOR, 4)
        if len(parts) != 5 or not (parts[0].isdigit() and parts[3].isdigit()):
            return None
        return cls(key, int(parts[0]), parts[1], parts[2], int(parts[3]), parts[4])

    @property
    def order(self) -> tuple[int, int, str]:
        """Sorts checkpoints of one identifier, oldest first; the same for everyone who looks, without a clock."""
        return self.version, self.attempt, self.key

    def is_of(self, run: str, task: str | None = None) -> bool:
        """Whether a task of this run (this task, if given) saved it."""
        return self.run == _quote(run) and (task is None or self.task == _quote(task))


def save_checkpoint(
    store: ObjectStore,
    path: str | Path,
    who: CheckpointTask,
    *,
    name: str = DEFAULT_NAME,
    metadata: Mapping[str, Any] | None = None,
    latest: bool = True,
) -> CheckpointRef:
    """Stores a directory or file as the next version; bytes that the store already holds are not stored again.

    Visible only when complete. Every call makes a version of its own, also among processes that save at once.
    ``latest=False`` keeps it from being loaded by itself. Raises ``SelectionError`` when there is nothing at
    ``path``, or for a name or metadata that cannot be stored.
    """
    _check_name(name)
    about = {
        "type": CheckpointRef.TYPE,
        "name": name,
        "attempt": who.attempt,
        "pathspec": who.pathspec,
        "iteration": who.iteration,
        "latest": bool(latest),
        "created_on": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "metadata": check_metadata(metadata, "a checkpoint"),
    }
    sources = files_to_save(path)
    version = _next_version(store, who)
    while True:
        manifest = store_files(store, sources, {**about, "version": version})
        key = _key(who, version, name)
        if not store.create(key, manifest.to_bytes()).created:
            version += 1
        elif condemned_files(store, manifest):
            # A collection condemned a blob between our look and our manifest: the next generation is safe.
            store.delete(key)
        else:
            return _reference(key, manifest)


def inherit_checkpoint(store: ObjectStore, reference: CheckpointRef, who: CheckpointTask) -> None:
    """Makes another run's checkpoint one of this task's too, as its next version, without copying any byte.

    So a resumed run that dies before it saves can be resumed itself.
    """
    original = read_manifest(store, reference.key)
    version = _next_version(store, who)
    while True:
        about = {**original.about, "attempt": who.attempt, "pathspec": who.pathspec, "version": version}
        manifest = Manifest(files=original.files, about=about)
        key = _key(who, version, reference.name)
        if store.create(key, manifest.to_bytes()).created:
            break
        version += 1
    if condemned_files(store, manifest):
        # The original was deleted in the meantime, and its bytes are about to go.
        store.delete(key)


def find_checkpoints(store: ObjectStore, prefix: str) -> Iterator[CheckpointKey]:
    """The checkpoints below a prefix, in order of their keys."""
    for info in store.list(prefix):
        found = CheckpointKey.parse(info.key)
        if found is not None:
            yield found


def newest_checkpoint(store: ObjectStore, who: CheckpointTask, *, any_run: bool) -> CheckpointRef | None:
    """What a starting attempt goes on from: the newest of this very task, else of the run that this one resumes (and
    there of the same iteration), else, with ``any_run``, of this identifier whichever run saved it. ``None`` when there
    is none.
    """
    found = sorted(find_checkpoints(store, who.prefix), key=lambda item: item.order, reverse=True)
    own = [item for item in found if item.is_of(who.run, who.task)]
    origin = [item for item in found if who.origin_run is not None and item.is_of(who.origin_run)]
    iterations = (None, who.iteration)  # None: written before iterations were told apart
    for item, is_any in (
        *((item, True) for item in own),
        *((item, False) for item in origin),
        *((item, True) for item in found if any_run),
    ):
        try:
            manifest = read_manifest(store, item.key)
        except NotFound:  # deleted since it was listed
            continue
        fits = is_any or manifest.about.get("iteration") in iterations
        if fits and manifest.about.get("latest", True):
            return _reference(item.key, manifest)
    return None


def checkpoint_reference(store: ObjectStore, key: str) -> CheckpointRef:
    """The reference of a stored checkpoint. Raises ``NotFound``, ``IntegrityError``."""
    return _reference(key, read_manifest(store, key))


def _next_version(store: ObjectStore, who: CheckpointTask) -> int:
    return max((found.version for found in find_checkpoints(store, who.prefix)), default=0) + 1


def _key(who: CheckpointTask, version: int, name: str) -> str:
    parts = (f"{version:0{_DIGITS}d}", _quote(who.run), _quote(who.task), str(who.attempt), quoted_name(name))
    return f"{who.prefix}/{_SEPARATOR.join(parts)}.json"


def _reference(key: str, manifest: Manifest) -> CheckpointRef:
    about = manifest.about
    return CheckpointRef(
        key=key,
        digest=manifest.digest,
        size=manifest.size,
        num_files=len(manifest.files),
        created_on=str(about["created_on"]),
        pathspec=str(about["pathspec"]),
        metadata=dict(about["metadata"]),
        name=str(about["name"]),
        version=int(about["version"]),
    )


def quoted_name(name: str) -> str:
    """A checkpoint's name as keys have it."""
    return quote_part(name)


def _check_name(name: str) -> None:
    if not name or len(quoted_name(name)) > MAX_NAME_BYTES:
        raise SelectionError(
            f"{name!r} cannot be the name of a checkpoint: it must not be empty or longer than {MAX_NAME_BYTES} "
            "characters (more than one for each that is no letter, digit or '-_.')."
        )


def _quote(part: str) -> str:
    return quote_part(part).replace(_SEPARATOR, "-!2D")
