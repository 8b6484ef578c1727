"""Directories of running tasks, with a note of which process each belongs to, so that those of killed ones go."""

import json
import logging
import os
import platform
import shutil
import tempfile
from pathlib import Path
from typing import Final, TypedDict

logger = logging.getLogger("metaflow_hf.store")

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_MACHINE_ID: Final = Path("/etc/machine-id")
_PID_NAMESPACE: Final = Path("/proc/self/ns/pid")


class Owner(TypedDict):
    """Which process a directory or file belongs to."""

    directory: str
    host: str
    boot: str
    namespace: str
    pid: int
    started: str


def create(register: Path, label: str, *, parent: Path | None = None) -> Path:
    """A fresh private directory below ``parent`` (``register`` by default), noted in ``register``."""
    register.mkdir(parents=True, exist_ok=True)
    parent = (parent or register).absolute()
    parent.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix=f"metaflow_hf_{label}_", dir=parent))
    try:
        _note(register, directory).write_text(json.dumps(owner_here(directory)))
    except OSError:
        # Without its note nobody would ever remove it.
        remove(register, directory)
        raise
    return directory


def remove(register: Path, directory: Path) -> None:
    """Removes a directory that ``create`` made."""
    shutil.rmtree(directory, ignore_errors=True)
    _note(register, directory).unlink(missing_ok=True)


def remove_orphans(register: Path) -> None:
    """Removes the directories of processes that have ended; those of other machines and containers are left to them."""
    for note in register.glob("*.owner"):
        try:
            owner: Owner = json.loads(note.read_text())
            if is_gone(owner):
                remove(register, Path(owner["directory"]))
        except (FileNotFoundError, ValueError):
            # Removed by its owner, or about to be written.
            continue
        except OSError as error:
            logger.warning("%s cannot be removed: %s", note, error.strerror or error)


def boot_id() -> str:
    """Differs after each start of the machine; empty where the system does not say."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


def _note(register: Path, directory: Path) -> Path:
    return register / f"{directory.name}.owner"


def owner_here(directory: Path) -> Owner:
    """The process that asks, as an owner."""
    pid = os.getpid()
    return Owner(
        directory=str(directory),
        host=_host(),
        boot=boot_id(),
        namespace=_namespace(),
        pid=pid,
        started=_started(pid),
    )


def is_gone(owner: Owner) -> bool:
    """Whether the process has ended for sure; of other machines and containers that cannot be known."""
    # Home directories are often shared: another boot is a later one only on the same machine, and all machines give
    # their first namespace of processes the same number.
    if owner.get("host") != _host() or not _namespace() or owner["namespace"] != _namespace():
        return False
    return owner["boot"] != boot_id() or _started(owner["pid"]) != owner["started"]


def _host() -> str:
    """Tells machines apart that share a file system: by name, and by id where the system has one."""
    try:
        return f"{platform.node()} {_MACHINE_ID.read_text().strip()}"
    except OSError:
        return platform.node()


def _namespace() -> str:
    try:
        return str(_PID_NAMESPACE.readlink())
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process began, in ticks since the boot, which tells it from a later one of the same number."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
