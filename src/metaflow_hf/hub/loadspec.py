"""What ``load=`` may say, turned into one kind of entry. Nothing of the user's is changed.

``@huggingface_hub``: ``"org/name"``, ``"org/name@revision"``, ``("org/name", "path")``, a dict of
``snapshot_download``'s arguments (and ``path``), a dict of aliases ``{"base": "org/name@v2"}``, or a list of these.
``@model``: artifact names or keys: ``"name"``, ``("name", "path")``, ``{"name": "path"}``, or a list of these.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from metaflow_hf.errors import SelectionError
from metaflow_hf.hub.names import check_repo_id

FORMS: Final = (
    "'org/name', 'org/name@revision', ('org/name', 'path'), a dict of snapshot_download's arguments, a dict of "
    "aliases {'base': 'org/name'}, or a list of these"
)


# What a dict without "repo_id" hardly means as names of repositories.
_ARGUMENTS: Final = frozenset(
    {"token", "headers", "allow_patterns", "ignore_patterns", "revision", "repo_type", "endpoint"}
)


@dataclass(frozen=True, slots=True)
class SnapshotEntry:
    """One repository to load: under which name, with which arguments of ``snapshot_download``, into which path."""

    name: str
    repo_id: str
    arguments: Mapping[str, Any] = field(repr=False)
    path: str | None = None


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One artifact (or key) to load, and into which path."""

    name: str
    path: str | None = None


def parse_snapshots(load: object) -> list[SnapshotEntry]:
    """The entries of ``@huggingface_hub(load=…)``, each under a name of its own.

    Two entries of one repository are told apart by their revisions, in whatever order; if those are the same too, by
    aliases. Raises ``SelectionError`` for anything else than the forms above, and for two entries of one name.
    """
    entries: dict[str, SnapshotEntry] = {}
    found = _snapshots(_plain(load))
    count = Counter(entry.name for entry in found)
    for entry in found:
        name = entry.name
        if count[name] > 1 and entry.arguments.get("revision") is not None:
            name = f"{name}@{entry.arguments['revision']}"
        if name in entries:
            raise SelectionError(
                f"load= names {name!r} twice, and one would hide the other: give them names of their own, as in "
                f'load={{"first": {{"repo_id": "{entry.repo_id}", …}}, "second": {{…}}}}.'
            )
        entries[name] = SnapshotEntry(name, entry.repo_id, entry.arguments, entry.path)
    return list(entries.values())


def parse_models(load: object) -> list[ModelEntry]:
    """The entries of ``@model(load=…)``. Raises ``SelectionError`` for other forms and for a name given twice."""
    entries: dict[str, ModelEntry] = {}
    for entry in _models(_plain(load)):
        if entry.name in entries:
            raise SelectionError(f"@model(load=…) names {entry.name!r} twice.")
        entries[entry.name] = entry
    return list(entries.values())


def without_tokens(load: object) -> tuple[Any, bool]:
    """``load`` without any ``token`` or ``headers``, and whether there was one."""
    plain = _plain(load)
    clean = _clean(plain)
    return clean, clean != plain


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _clean(item) for name, item in value.items() if name not in ("token", "headers")}
    if isinstance(value, (list, tuple)):
        return type(value)(_clean(item) for item in value)
    return value


def _plain(value: object) -> Any:
    # Values from a Config are mappings and lists of their own types.
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value


def _snapshots(load: Any) -> list[SnapshotEntry]:
    if load is None:
        return []
    if isinstance(load, list):
        return [_snapshot(item) for item in load]
    if isinstance(load, dict) and "repo_id" not in load:
        if meant := sorted(_ARGUMENTS & set(load)):
            # Read as an alias, a token would be asked for as a repository, and be shown.
            raise SelectionError(
                f"load= is a dict with {', '.join(map(repr, meant))} but without 'repo_id': name the repository, or, if "
                "these are meant as aliases, choose other names."
            )
        return [_snapshot(item, alias=alias) for alias, item in load.items()]
    return [_snapshot(load)]


def _snapshot(item: Any, *, alias: str | None = None) -> SnapshotEntry:
    path: Any = None
    # Config values have no tuples: inside a list a pair is a list of two.
    if isinstance(item, (tuple, list)) and len(item) == 2:
        item, path = item
    if isinstance(item, str):
        repo_id, at, revision = item.partition("@")
        arguments: dict[str, Any] = {"revision": revision} if at else {}
        name = item
    elif isinstance(item, dict) and "repo_id" in item:
        arguments = {key: value for key, value in item.items() if key not in ("repo_id", "path")}
        repo_id = item["repo_id"]
        path = item.get("path", path)
        name = repo_id
    elif isinstance(item, dict) and alias is None and len(item) == 1:
        [(alias, inner)] = item.items()
        return _snapshot(inner, alias=alias)
    else:
        raise SelectionError(f"load={_clean(item)!r} is not understood: write {FORMS}.")
    if not (path is None or (isinstance(path, str) and path)):
        raise SelectionError(f"load=: the path of {repo_id!r} must be a non-empty string, got {path!r}.")
    if "local_dir" in arguments:
        raise SelectionError(f"load=: use 'path' instead of 'local_dir' for {repo_id!r}.")
    return SnapshotEntry(alias or str(name), check_repo_id(repo_id), arguments, path)


def _models(load: Any) -> list[ModelEntry]:
    if load is None:
        return []
    if isinstance(load, dict):
        return [_model((name, path)) for name, path in load.items()]
    if isinstance(load, list):
        return [_model(item) for item in load]
    return [_model(load)]


def _model(item: Any) -> ModelEntry:
    if isinstance(item, str) and item:
        return ModelEntry(item)
    if isinstance(item, (tuple, list)) and len(item) == 2:
        name, path = item
        if isinstance(name, str) and name and (path is None or isinstance(path, str)):
            return ModelEntry(name, path)
    raise SelectionError(
        f"@model(load={item!r}) is not understood: write the name of an artifact that holds a reference, ('name', "
        "'path'), {'name': 'path'}, a key, or a list of these."
    )
