"""Which file names of a hub, a manifest or a user may be written below a directory.

Everything that comes from outside passes here before it becomes a path: a name that could leave its
directory, or that another system reads differently, is refused.
"""

import re
from collections.abc import Iterable
from typing import Final

from metaflow_hf.errors import SelectionError

_RESERVED: Final = frozenset(
    {"con", "prn", "aux", "nul", *(f"com{n}" for n in range(1, 10)), *(f"lpt{n}" for n in range(1, 10))}
)
_DRIVE: Final = re.compile(r"^[A-Za-z]:")
MAX_PART_BYTES: Final = 255


def check_filename(path: str) -> str:
    """Returns ``path`` if it is a plain relative path with ``/`` between its parts.

    Raises ``SelectionError`` for an absolute path, ``.``, ``..`` or empty parts, a drive, a backslash, control
    characters, names that some systems reserve (``con``, ``nul``, …) and parts above 255 bytes.
    """
    reason = _why_not(path)
    if reason:
        raise SelectionError(
            f"the file name {path!r} is refused because it {reason}: a repository or manifest with such a name is "
            "broken or hostile. Leave the file out with ignore_patterns if you trust the rest."
        )
    return path


def check_filenames(paths: Iterable[str]) -> None:
    """Checks each path, and that no two of them can mean one file on any system.

    Raises ``SelectionError`` also for names that differ in case only, and for a file that is another's folder.
    """
    seen: dict[str, str] = {}
    folders: dict[str, str] = {}
    for path in paths:
        folded = check_filename(path).casefold()
        if folded in seen:
            raise SelectionError(
                f"the file names {seen[folded]!r} and {path!r} are equal on systems that ignore case: leave one out "
                "with ignore_patterns."
            )
        seen[folded] = path
        parts = folded.split("/")
        for end in range(1, len(parts)):
            folders["/".join(parts[:end])] = path
    for folded, path in seen.items():
        if folded in folders:
            raise SelectionError(f"{path!r} is a file and also the folder of {folders[folded]!r}.")


def _why_not(path: str) -> str | None:
    parts = path.split("/")
    if not path or path.startswith("/") or _DRIVE.match(path):
        return "is empty, absolute or names a drive"
    if any(part in ("", ".", "..") for part in parts):
        return "has empty parts, '.' or '..'"
    if "\\" in path or any(ord(c) < 32 or ord(c) == 127 for c in path):
        return "has a backslash or control characters"
    if any(part.partition(".")[0].rstrip().casefold() in _RESERVED for part in parts):
        return "has a name that some systems reserve for devices"
    try:
        if any(len(part.encode()) > MAX_PART_BYTES for part in parts):
            return f"has a part of more than {MAX_PART_BYTES} bytes"
    except UnicodeEncodeError:
        return "is not valid Unicode"
    return None
