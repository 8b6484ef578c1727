"""Keeps the node's cache within bounds, and clears what killed processes left there.

Whatever goes can be fetched again. Blobs that a task still links to, or used within the last minutes, stay: deleting
them would free nothing, or pull the file from under somebody who is about to copy it.
"""

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from metaflow_hf import environment
from metaflow_hf.store import work_dirs
from metaflow_hf.store.node_cache import NodeCache

logger = logging.getLogger("metaflow_hf.store")

BETWEEN_TRIMS_SECONDS: Final = 600.0
IN_USE_SECONDS: Final = 600.0
STALE_PART_SECONDS: Final = 86_400.0
STALE_STAGING_SECONDS: Final = 7 * 86_400.0
STALE_TREE_SECONDS: Final = 7 * 86_400.0
# Of the file system's size, where METAFLOW_HF_CACHE_BYTES does not say otherwise.
DEFAULT_SHARE: Final = 0.25


@dataclass(frozen=True, slots=True)
class _Blob:
    path: Path
    size: int
    used: float
    is_linked: bool


def trim(
    cache: NodeCache,
    *,
    max_bytes: int | None = None,
    now: Callable[[], float] = time.time,
    force: bool = False,
) -> int:
    """Removes leftovers, and the least recently used blobs until the rest takes at most ``max_bytes``.

    Does nothing when somebody did it within the last ten minutes, unless ``force``. Returns the bytes freed.
    Safe while other processes use the cache. ``max_bytes`` defaults to ``METAFLOW_HF_CACHE_BYTES``, else a quarter of
    the file system.
    """
    mark = cache.root / "trimmed"
    if not force and mark.exists() and now() - mark.stat().st_mtime < BETWEEN_TRIMS_SECONDS:
        return 0
    try:
        mark.touch()
        os.utime(mark, (now(), now()))
    except OSError as error:
        # A full disk is the very reason to go on; one that may not be written says so where it matters.
        logger.warning("the node cache %s cannot be written: %s", cache.root, error.strerror or error)
    _remove_leftovers(cache, now())
    if max_bytes is None:
        max_bytes = environment.node_cache_bytes()
    if max_bytes is None:
        max_bytes = int(shutil.disk_usage(cache.root).total * DEFAULT_SHARE)
    blobs = sorted(_blobs(cache), key=lambda blob: blob.used)
    total, freed = sum(blob.size for blob in blobs), 0
    if total > max_bytes and _remove_stale_trees(cache, now()):
        blobs = sorted(_blobs(cache), key=lambda blob: blob.used)
    for blob in blobs:
        if total - freed <= max_bytes:
            break
        if blob.is_linked or now() - blob.used < IN_USE_SECONDS:
            continue
        if _can(partial(cache.forget, blob.path.name), blob.path):
            freed += blob.size
    if freed:
        logger.info("removed %d bytes from the node cache %s", freed, cache.root)
    return freed


def _blobs(cache: NodeCache) -> Iterator[_Blob]:
    for path in (cache.root / "blobs").glob("*/*"):
        if "." in path.name:
            continue
        try:
            info = path.stat()
            record = path.with_name(f"{path.name}.verified")
            used = record.stat().st_mtime if record.exists() else info.st_mtime
        except FileNotFoundError:
            continue
        yield _Blob(path, info.st_size, used, info.st_nlink > 1)


def _remove_leftovers(cache: NodeCache, now: float) -> None:
    for pattern in ("*/*.part", "*/*.claim"):
        for left in (cache.root / "blobs").glob(pattern):
            if _age(left, now) > STALE_PART_SECONDS:
                _can(partial(left.unlink, missing_ok=True), left)
    for commit in (cache.root / "staging").glob("*/*/*"):
        if _age(commit, now) > STALE_STAGING_SECONDS:
            shutil.rmtree(commit, ignore_errors=True)
    work_dirs.remove_orphans(cache.root / "work")


def _remove_stale_trees(cache: NodeCache, now: float) -> bool:
    """Removes the directories that scripts were given and have not asked for lately: they hold links to blobs."""
    stale = [tree for tree in (cache.root / "trees").glob("*/*/*/*") if _age(tree, now) > STALE_TREE_SECONDS]
    for tree in stale:
        shutil.rmtree(tree, ignore_errors=True)
    return bool(stale)


def _can(remove: Callable[[], None], what: Path) -> bool:
    """Whether it could be removed; what cannot must fail nobody who has done his work and only tidies up."""
    try:
        remove()
    except OSError as error:
        logger.warning("%s cannot be removed: %s", what, error.strerror or error)
        return False
    return True


def _age(path: Path, now: float) -> float:
    try:
        return now - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
