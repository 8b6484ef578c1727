"""The project's flows and configurations, as they travel in the wheel: ``flows`` and ``configs`` here are those of the
project's root.
"""

from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Final

_KINDS: Final = {"flows": ".py", "configs": ".yaml"}


def template_files() -> dict[str, Traversable]:
    """Path relative to a project (``flows/train_flow.py``) -> file, sorted."""
    found = {
        f"{folder}/{file.name}": file
        for folder, ending in _KINDS.items()
        for file in files(__name__).joinpath(folder).iterdir()
        if file.name.endswith(ending) and not file.name.startswith("_")
    }
    return dict(sorted(found.items()))
