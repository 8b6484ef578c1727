"""Who on this node is bringing a blob right now, so that eight tasks that start together read it from the store once.

Only a courtesy: files appear by renames, so that two who bring the same blob do no harm. There are no file locks,
which are no-ops on some shared file systems: a claim is a file that only one can create. Whose process is gone, or
whose download has stopped growing, has lost it.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from metaflow_hf.store import work_dirs

STALL_SECONDS: Final = 20.0
FIRST_PAUSE_SECONDS: Final = 0.02
MAX_PAUSE_SECONDS: Final = 0.5


@contextmanager
def bringing(path: Path, *, done: Callable[[], bool], stall_seconds: float = STALL_SECONDS) -> Iterator[bool]:
    """Waits until it is our turn to bring ``path`` (then ``True``), or until another has brought it (``False``).

    ``done`` says whether the file is there and good.
    """
    claim = path.with_name(f"{path.name}.claim")
    if not _take(claim, path, done, stall_seconds):
        yield False
        return
    try:
        yield True
    finally:
        claim.unlink(missing_ok=True)


def _take(claim: Path, path: Path, done: Callable[[], bool], stall_seconds: float) -> bool:
    owner = json.dumps(work_dirs.owner_here(path))
    pause, seen, since, is_ours = FIRST_PAUSE_SECONDS, -1, time.monotonic(), False
    while True:
        try:
            with claim.open("x") as file:
                is_ours = True
                file.write(owner)
        except FileExistsError:
            pass
        except OSError:
            # The disk is full: an empty claim would keep others waiting.
            if is_ours:
                claim.unlink(missing_ok=True)
            raise
        else:
            return True
        if done():
            return False
        arrived = _arrived_bytes(path)
        if arrived != seen:
            seen, since = arrived, time.monotonic()
        if _is_orphan(claim) or time.monotonic() - since > stall_seconds:
            claim.unlink(missing_ok=True)
            continue
        time.sleep(pause)
        pause = min(pause * 1.5, MAX_PAUSE_SECONDS)


def _arrived_bytes(path: Path) -> int:
    total = 0
    for part in path.parent.glob(f".{path.name}.*.part"):
        try:
            total += part.stat().st_size
        except FileNotFoundError:
            continue
    return total


def _is_orphan(claim: Path) -> bool:
    try:
        owner: work_dirs.Owner = json.loads(claim.read_text())
    except (FileNotFoundError, ValueError):
        # Given back, or about to be written.
        return False
    return work_dirs.is_gone(owner)
