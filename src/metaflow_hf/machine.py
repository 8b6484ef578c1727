"""What this process may use of its machine."""

import os
from pathlib import Path


def usable_memory(root: Path = Path("/")) -> tuple[int, str]:
    """Bytes of memory that this process may use, and what says so: the machine, or the limit of a container.

    ``root`` is where ``proc`` and ``sys`` are found.
    """
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = min(_container_limits(root), default=machine)
    return (limit, "the container's limit") if limit < machine else (machine, "the machine's")


def _container_limits(root: Path) -> list[int]:
    """The limits of this process's control groups and of all groups around them, of both versions."""
    try:
        lines = (root / "proc/self/cgroup").read_text("utf-8").splitlines()
    except OSError:
        return []
    limits = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            base, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            base, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        # Inside a container its own group is mounted at the top, whatever path the kernel tells.
        inner = base / group.lstrip("/")
        places = [inner, *(parent for parent in inner.parents if parent.is_relative_to(base))]
        limits += [limit for place in places if (limit := _read_limit(place / name)) is not None]
    return limits


def _read_limit(file: Path) -> int | None:
    try:
        text = file.read_text("utf-8").strip()
    except OSError:
        return None
    # "max" is none.
    return int(text) if text.isdigit() else None
