"""Another extension that gives the same names: the user is told which one answers."""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

OTHER = "metaflow-checkpoint"
_told: set[str] = set()


def other_version() -> str | None:
    """The version of metaflow-checkpoint that is installed beside this package; ``None`` without it."""
    try:
        return version(OTHER)
    except PackageNotFoundError:
        return None


def answering() -> dict[str, str]:
    """Decorator -> the module that answers to its name here, for the names that both packages give."""
    from metaflow.plugins import STEP_DECORATORS

    names = ("checkpoint", "huggingface_hub", "model")
    return {known.name: known.__module__ for known in STEP_DECORATORS if known.name in names}


def tell(run_id: str, say: Callable[[str], None]) -> None:
    """Says once per run who answers where both are installed; nothing where they are not."""
    found = other_version() if run_id not in _told else None
    _told.add(run_id)
    if found is None:
        return
    ours = [
        f"@{name}" for name, module in answering().items() if module.startswith("metaflow_extensions.hf.")
    ]
    say(
        f"{OTHER} {found} is installed too. {', '.join(ours)} of this run are metaflow-hf's, and what the other stored "
        "is not seen by them: uninstall the one that you do not use."
    )
