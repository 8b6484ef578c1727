"""Whether loaded files may be links: for people who want every file to be a writable one of their own."""

from typing import Final

from metaflow_hf import environment
from metaflow_hf.errors import SelectionError

MODES: Final = ("auto", "copy")


def may_link(mode: str | None = None) -> bool:
    """Whether large files in directories of ours may be read-only links into the node's cache.

    ``auto`` allows it, ``copy`` does not; ``None`` is what ``METAFLOW_HF_MATERIALIZE`` says, else ``auto``. Raises
    ``SelectionError`` for another word.
    """
    wanted = mode if mode is not None else environment.materialize_mode() or "auto"
    if wanted not in MODES:
        where = "materialize" if mode is not None else "METAFLOW_HF_MATERIALIZE"
        raise SelectionError(f"{where}={wanted!r} is none of {', '.join(MODES)}.")
    return wanted == "auto"
