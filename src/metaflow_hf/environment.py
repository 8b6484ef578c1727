"""Every environment variable that the library reads, each by one function, at each call.

Nothing is remembered: a variable that a test, a notebook or a hook sets later counts from then on. Only the
standard library is imported, so that a decorator may ask too.
"""

import os
import tempfile
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Final

DEFAULT_ENDPOINT: Final = "https://huggingface.co"
_TRUE: Final = frozenset({"1", "ON", "YES", "TRUE"})


def _is_true(name: str) -> bool:
    return os.environ.get(name, "").upper() in _TRUE


def hub_endpoint() -> str:
    """``HF_ENDPOINT``, else the public hub; without a slash at the end."""
    return (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")


def use_hub(endpoint: str) -> None:
    """Makes ``endpoint`` this process's hub, for libraries too that read ``HF_ENDPOINT`` when they are imported."""
    os.environ["HF_ENDPOINT"] = endpoint


def embedded_endpoint() -> str | None:
    """Where the embedded hub of this process listens (``METAFLOW_HF_EMBEDDED_ENDPOINT``), if it runs."""
    value = os.environ.get("METAFLOW_HF_EMBEDDED_ENDPOINT", "").rstrip("/")
    return value or None


def wants_embedded_hub() -> bool:
    """Whether ``METAFLOW_HF_HUB=embedded`` asks for the embedded hub instead of ``HF_ENDPOINT``."""
    return os.environ.get("METAFLOW_HF_HUB", "") == "embedded"


def is_offline() -> bool:
    """Whether ``HF_HUB_OFFLINE`` (or ``TRANSFORMERS_OFFLINE``) forbids asking the hub."""
    return _is_true("HF_HUB_OFFLINE") or _is_true("TRANSFORMERS_OFFLINE")


def hosts_without_proxy() -> list[str]:
    """The hosts that are asked directly (``NO_PROXY`` or ``no_proxy``)."""
    value = os.environ.get("NO_PROXY") or os.environ.get("no_proxy") or ""
    return [host.strip() for host in value.split(",") if host.strip()]


def checkpoint_context() -> str | None:
    """What ``@checkpoint`` tells the processes that its task starts (``METAFLOW_HF_CHECKPOINT``), as JSON."""
    return os.environ.get("METAFLOW_HF_CHECKPOINT") or None


def set_checkpoint_context(context: str | None) -> None:
    """Tells this process's children which task's checkpoints they save and load; ``None`` takes it back."""
    if context is None:
        os.environ.pop("METAFLOW_HF_CHECKPOINT", None)
    else:
        os.environ["METAFLOW_HF_CHECKPOINT"] = context


def hub_cache() -> Path:
    """The user's huggingface_hub cache (``HF_HUB_CACHE``, ``HF_HOME``, XDG), which may not exist."""
    if explicit := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(explicit).expanduser()
    home = os.environ.get("HF_HOME")
    return (Path(home).expanduser() if home else _user_cache() / "huggingface") / "hub"


def node_cache_root() -> Path:
    """Where this node keeps what it loaded: ``METAFLOW_HF_CACHE``, else the user's cache directory (XDG), else
    the temporary directory.
    """
    if explicit := os.environ.get("METAFLOW_HF_CACHE"):
        return Path(explicit).expanduser().absolute()
    home = _user_cache()
    if _is_usable(home):
        return home / "metaflow-hf"
    return Path(tempfile.gettempdir()) / f"metaflow-hf-{os.getuid()}"


def explicit_node_cache() -> str | None:
    """``METAFLOW_HF_CACHE`` as it is set."""
    return os.environ.get("METAFLOW_HF_CACHE") or None


def set_node_cache(place: str | None) -> None:
    """Sets ``METAFLOW_HF_CACHE`` for this process and its children; ``None`` takes it back."""
    if place is None:
        os.environ.pop("METAFLOW_HF_CACHE", None)
    else:
        os.environ["METAFLOW_HF_CACHE"] = place


def node_cache_bytes() -> int | None:
    """How much the node's cache may hold (``METAFLOW_HF_CACHE_BYTES``); ``None`` leaves it to the default."""
    value = os.environ.get("METAFLOW_HF_CACHE_BYTES", "")
    return int(value) if value.isdigit() else None


def materialize_mode() -> str | None:
    """How loaded files get into directories of their own (``METAFLOW_HF_MATERIALIZE``): ``auto`` or ``copy``."""
    return os.environ.get("METAFLOW_HF_MATERIALIZE") or None


def _user_cache() -> Path:
    explicit = os.environ.get("XDG_CACHE_HOME")
    return Path(explicit).expanduser() if explicit else Path("~/.cache").expanduser()


def _is_usable(directory: Path) -> bool:
    while not directory.exists() and directory != directory.parent:
        directory = directory.parent
    return directory.is_dir() and os.access(directory, os.W_OK)


def runs_locally() -> bool:
    """Whether this task shares its machine with the run's other tasks, rather than having a pod of its own."""
    return os.environ.get("METAFLOW_RUNTIME_ENVIRONMENT", "local") == "local"


def visible_gpus() -> list[str] | None:
    """The ids in ``CUDA_VISIBLE_DEVICES`` as they are written; ``None`` when it does not restrict anything.

    As CUDA reads it: what no GPU can be called (``-1``, by which people hide all of them) ends the list.
    """
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    if value is None:
        return None
    ids = (part.strip() for part in value.split(",") if part.strip())
    return list(takewhile(lambda name: name.isdecimal() or name.startswith(("GPU-", "MIG-")), ids))


def see_only_gpus(gpus: Sequence[str]) -> None:
    """Makes ``gpus`` (indices or UUIDs) the only ones that this process sees; before CUDA is first used."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
