"""Files about a repository, which `datasets` may take for rows of text."""

import re
from pathlib import PurePosixPath
from typing import Final

from metaflow_hf.data.sources.compression import uncompressed_name

# Texts about a repository, by their names without ending, and by the first word of these.
_ABOUT: Final = frozenset(
    [
        "acknowledgements",
        "authors",
        "changelog",
        "changes",
        "citation",
        "citations",
        "codeofconduct",
        "codeowners",
        "contributing",
        "contributors",
        "copying",
        "copyright",
        "credits",
        "datasetcard",
        "disclaimer",
        "licence",
        "licences",
        "license",
        "licenses",
        "maintainers",
        "notice",
        "notices",
        "patents",
        "readme",
        "requirements",
        "robots",
        "sha256sums",
        "thanks",
    ]
)
_ABOUT_BEGINNINGS: Final = frozenset({"licence", "license", "readme", "requirements"})
_TEXT_ENDINGS: Final = ("txt", "text")


def is_about(name: str) -> bool:
    """Whether a file is about a repository, such as LICENSE.txt: its lines are no rows, though `datasets` reads them."""
    file_name = PurePosixPath(name).name.lower()
    stem, _, ending = uncompressed_name(file_name).partition(".")
    if ending not in _TEXT_ENDINGS:
        return False
    return (
        stem.replace("_", "").replace("-", "") in _ABOUT or re.split(r"[-_ ]", stem)[0] in _ABOUT_BEGINNINGS
    )
