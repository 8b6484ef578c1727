"""Directories of unfinished downloads: each is one download's alone while it runs, and the next one's after a kill.

Downloads that know nothing of each other meet on a node: of flows with different datastores, of tasks that heal the
same snapshot, of one that was stopped and one that took over from it. Two that wrote the same files would spoil both.
Here a lock of the system is right, which goes with its process; where a file system has none, nothing is kept apart.
"""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Final

logger = logging.getLogger("metaflow_hf.store")

_LOCK: Final = ".lock"


@contextmanager
def own_directory(directory: Path) -> Iterator[Path]:
    """``directory``, or one beside it while that is in use, with what a killed download left there."""
    for number in count():
        place = directory.with_name(f"{directory.name}.{number}") if number else directory
        lock = _lock(place)
        if lock is None:
            continue
        try:
            # Not stale, however long ago it was left.
            os.utime(place)
            yield place
        finally:
            os.close(lock)
        return


def _lock(place: Path) -> int | None:
    """The descriptor that holds the directory until it is closed; ``None`` while another one does."""
    while True:
        place.mkdir(parents=True, exist_ok=True)
        try:
            lock = os.open(place / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        except FileNotFoundError:
            # Whoever used it has finished, and removed it.
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        except OSError as error:
            logger.debug("%s cannot be locked: %s", place, error)
        if _is_at(lock, place / _LOCK):
            return lock
        os.close(lock)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
