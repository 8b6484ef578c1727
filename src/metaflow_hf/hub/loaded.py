"""What a task has loaded: paths by name, and the directories that go when the task ends."""

import logging
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from metaflow_hf.errors import SelectionError
from metaflow_hf.store.eviction import trim
from metaflow_hf.store.node_cache import NodeCache

logger = logging.getLogger("metaflow_hf.hub")


class Loaded(Mapping[str, str]):
    """Name -> path of what is loaded. ``info`` maps the same names to the references, as plain dicts.

    A repository that was loaded once is also found by its plain id, whatever revision it was asked for with.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._paths: dict[str, str] = {}
        self._names: dict[str, list[str]] = {}
        self.info: dict[str, dict[str, Any]] = {}

    def __getitem__(self, name: str) -> str:
        if name in self._paths:
            return self._paths[name]
        found = self._names.get(name, [])
        if len(found) > 1:
            raise KeyError(
                f"{self._what} has loaded {name!r} several times; name one of {', '.join(map(repr, found))}"
            )
        if not found:
            raise KeyError(
                f"{self._what} has not loaded {name!r}; loaded: {', '.join(map(repr, self._paths)) or 'nothing'}"
            )
        return self._paths[found[0]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    def __repr__(self) -> str:
        return f"{self._what}.loaded({self._paths})"

    def _add(self, name: str, path: str, reference: dict[str, Any], *, repo_id: str | None = None) -> None:
        self._paths[name] = path
        self.info[name] = reference
        if repo_id is not None:
            self._names.setdefault(repo_id, []).append(name)


class Directories:
    """The directories that one task loads into: its own, removed at the end, and those that the user named."""

    def __init__(self, cache: NodeCache, root: str | None = None) -> None:
        self._cache = cache
        self._root = None if root is None else Path(root)
        self._own: list[Path] = []
        self._written: dict[Path, dict[str, str]] = {}
        # How many loads write there at this moment.
        self._loading: Counter[Path] = Counter()
        self._lock = threading.Lock()

    def new(self, label: str) -> Path:
        """A fresh directory, which is removed when the task ends."""
        directory = self._cache.new_work_dir(label, root=self._root)
        self._own.append(directory)
        return directory

    @contextmanager
    def claim(self, target: Path, paths: Iterable[str], what: str) -> Iterator[None]:
        """For the time in which ``what`` is loaded into a directory; notes what lies there afterwards. Raises
        ``SelectionError`` when it would overwrite files of something else that are there still, or on their way.
        """
        place, claimed = target.absolute().resolve(), list(paths)
        with self._lock:
            written = self._written.setdefault(place, {})
            for path in claimed:
                other = written.get(path, what)
                if other != what and (self._loading[place] or (place / path).exists()):
                    raise SelectionError(
                        f"{other} and {what} both have a file {path!r} and are loaded into {str(target)!r}: give them "
                        "different paths."
                    )
            written.update(dict.fromkeys(claimed, what))
            self._loading[place] += 1
        try:
            yield
        finally:
            with self._lock:
                self._loading[place] -= 1

    def remove(self, directory: Path) -> None:
        """Removes one of the task's own directories before its end."""
        self._own.remove(directory)
        self._cache.remove_work_dir(directory)

    def close(self) -> None:
        """Removes the task's own directories (those that the user named stay) and trims the node's cache."""
        for directory in self._own:
            self._cache.remove_work_dir(directory)
        self._own.clear()
        trim(self._cache)
