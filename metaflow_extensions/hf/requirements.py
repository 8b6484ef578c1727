"""What the decorators need where a task runs: asked of `@pypi` and `@conda`, and named when it is not there.

Remote tasks get this package's own code from Metaflow, but not what it imports.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from metaflow.exception import MetaflowException

# As in pyproject.toml, of which remote tasks know nothing.
REQUIREMENTS: Final = {"huggingface_hub": ">=1.0", "obstore": ">=0.8", "stamina": ">=24.2"}


class MissingPackage(MetaflowException):
    """The environment of a task lacks something that a decorator needs, or has too old a version of it."""

    headline = "Missing package"


def add_requirements(decorators: Iterable[Any]) -> None:
    """Adds what is needed to the packages of a step's ``@pypi`` or ``@conda``; what the user chose stays."""
    for decorator in decorators:
        if decorator.name in ("pypi", "conda"):
            chosen = decorator.attributes["packages"] or {}
            names = {name.replace("-", "_").lower() for name in chosen}
            added = {name: version for name, version in REQUIREMENTS.items() if name not in names}
            decorator.attributes["packages"] = {**chosen, **added}


@contextmanager
def requirements_of(decorator: str) -> Iterator[None]:
    """Turns a failed import of a requirement into ``MissingPackage``."""
    try:
        yield
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package not in REQUIREMENTS:
            raise
        lacks = "is not installed" if isinstance(error, ModuleNotFoundError) else f"is too old ({error})"
        raise MissingPackage(
            f"@{decorator} needs {package}{REQUIREMENTS[package]}, which {lacks} where this task runs. Use an image that "
            f"has it (--with kubernetes:image=… or batch:image=…), or add @pypi to the step (and --environment=pypi), "
            "which gets what is needed by itself."
        ) from error
