"""One line per figure: ours, the other's, their ratio and the goal."""

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median


def show(
    what: str,
    ours: Sequence[float],
    theirs: Sequence[float] = (),
    *,
    unit: str = "s",
    goal_ratio: float | None = None,
    goal: float | None = None,
) -> None:
    """Prints medians. With both, the ratio is the median of the ratios of each repetition."""
    parts = [f"{what}: ours {median(ours):.3f} {unit}"]
    verdict = ""
    if theirs:
        ratio = median(a / b for a, b in zip(ours, theirs, strict=True))
        parts.append(f"theirs {median(theirs):.3f} {unit}, ratio {ratio:.3f}")
        if goal_ratio is not None:
            verdict = f"goal <= {goal_ratio:g}x: {'holds' if ratio <= goal_ratio else 'MISSED'}"
    if goal is not None:
        verdict = f"goal <= {goal:g} {unit}: {'holds' if median(ours) <= goal else 'MISSED'}"
    if verdict:
        parts.append(verdict)
    if len(ours) > 1:
        parts.append(f"({len(ours)} repetitions, {min(ours):.3f} to {max(ours):.3f} {unit})")
    print(", ".join(parts), flush=True)


def seconds(work: Callable[..., object], *arguments: object, **options: object) -> float:
    began = time.perf_counter()
    work(*arguments, **options)
    return time.perf_counter() - began


def stored_bytes(root: Path) -> int:
    """Bytes of all files below ``root``, each inode once."""
    found = {(info.st_dev, info.st_ino): info.st_size for info in _infos(root)}
    return sum(found.values())


def _infos(root: Path) -> Iterator:
    for path in root.rglob("*"):
        if path.is_file() and not path.is_symlink():
            yield path.stat()


def settle() -> None:
    """Lets the disk finish what an earlier measurement left to it."""
    subprocess.run(["sync"], check=True)


@contextmanager
def scratch(directory: Path, name: str) -> Iterator[Path]:
    """An empty directory that is gone, from the disk too, before the next measurement begins."""
    place = directory / name
    place.mkdir()
    try:
        yield place
    finally:
        shutil.rmtree(place)
        settle()
