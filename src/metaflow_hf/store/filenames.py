"""Which file names of a hub, a manifest or a user may be written below a directory.

Everything that comes from outside passes here before it becomes a path: a name that could leave its
directory, or that another system reads differently, is refused.
"""

import re
import unicodedata
from collections.abc import Iterable
from typing import Final

from metaflow_hf.errors import SelectionError

# Windows also reads the superscripts as digits here.
_PORTS: Final = "123456789¹²³"
_RESERVED: Final = frozenset(
    {"con", "prn", "aux", "nul", "conin$", "conout$"}
    | {f"{kind}{n}" for kind in ("com", "lpt") for n in _PORTS}
)
_DRIVE: Final = re.compile(r"[A-Za-z]:")
MAX_PART_BYTES: Final = 255
# Below what systems allow for a whole path (4,096 bytes on Linux, 1,024 on macOS), so that a target fits before it.
MAX_PATH_BYTES: Final = 800


def check_filename(path: str) -> str:
    """Returns ``path`` if it is a plain relative path with ``/`` between its parts.

    Raises ``SelectionError`` for an absolute path, ``.``, ``..`` or empty parts, a drive, a backslash, control
    characters, names that some systems reserve (``con``, ``nul``, …) or shorten (a dot or space at the end), parts
    above 255 bytes and paths above 800.
    """
    reason = _why_not(path)
    if reason:
        raise SelectionError(
            f"the file name {_shown(path)} is refused because it {reason}: a repository or manifest with such a name "
            "is broken or hostile. Leave the file out with ignore_patterns if you trust the rest; rename your own."
        )
    return path


def check_filenames(paths: Iterable[str]) -> None:
    """Checks each path, and that no two of them can mean one file on any system.

    Raises ``SelectionError`` also for names that differ only in case or in how Unicode composes their letters, and
    for a file that is another's folder.
    """
    seen: dict[str, str] = {}
    folders: dict[str, str] = {}
    for path in paths:
        folded = _folded(check_filename(path))
        if folded in seen:
            raise SelectionError(
                f"the file names {seen[folded]!r} and {path!r} are one name on systems that ignore case or compose "
                "letters: leave one out with ignore_patterns, or rename your own."
            )
        seen[folded] = path
        parts = folded.split("/")
        for end in range(1, len(parts)):
            folders["/".join(parts[:end])] = path
    for folded, path in seen.items():
        if folded in folders:
            raise SelectionError(f"{path!r} is a file and also the folder of {folders[folded]!r}.")


def _folded(path: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())


def _shown(path: str) -> str:
    return repr(path) if len(path) <= MAX_PART_BYTES else f"{path[:60]!r}…"


def _why_not(path: str) -> str | None:
    parts = path.split("/")
    if not path or path.startswith("/") or any(_DRIVE.match(part) for part in parts):
        return "is empty, absolute or names a drive"
    if any(part in ("", ".", "..") for part in parts):
        return "has empty parts, '.' or '..'"
    if "\\" in path or any(ord(c) < 32 or 127 <= ord(c) < 160 for c in path):
        return "has a backslash or control characters"
    if any(part.endswith((".", " ")) for part in parts):
        return "has a part that ends with a dot or space, which some systems drop"
    if any(part.partition(".")[0].rstrip().casefold() in _RESERVED for part in parts):
        return "has a name that some systems reserve for devices"
    try:
        if any(len(part.encode()) > MAX_PART_BYTES for part in parts):
            return f"has a part of more than {MAX_PART_BYTES} bytes"
        if len(path.encode()) > MAX_PATH_BYTES:
            return f"has more than {MAX_PATH_BYTES} bytes"
    except UnicodeEncodeError:
        return "is not valid Unicode"
    return None
