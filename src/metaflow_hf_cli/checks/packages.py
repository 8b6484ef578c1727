"""What is installed, whether the versions fit, and which extension of Metaflow answers to our decorators."""

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Final

from packaging.requirements import Requirement

from metaflow_extensions.hf import neighbours
from metaflow_hf import __version__
from metaflow_hf_cli.checks.findings import Check, Finding, ok, problem, warning

DISTRIBUTION: Final = "metaflow-hf"
_SHOWN: Final = ("metaflow", "huggingface_hub", "datasets", "transformers", "torch")
_EXTRAS: Final = {
    "peft": "peft",
    "bitsandbytes": "bitsandbytes",
    "documents": "pypdfium2",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "wandb": "wandb",
    "mlflow": "mlflow-skinny",
    "publish": "vl-convert-python",
    "lm-eval": "lm_eval",
}


def checks() -> list[Check]:
    return [
        Check("packages", look_at_versions, f"reinstall: pip install --force-reinstall {DISTRIBUTION}"),
        Check("extension", look_at_extension, f"reinstall: pip install --force-reinstall {DISTRIBUTION}"),
    ]


def look_at_versions() -> Iterator[Finding]:
    shown = ", ".join(f"{name} {found}" for name in _SHOWN if (found := installed(name)))
    yield ok("packages", f"{DISTRIBUTION} {__version__} on Python {platform.python_version()}: {shown}")
    yield from unmet(requires(DISTRIBUTION) if installed(DISTRIBUTION) else [])
    extras = [name for name, package in _EXTRAS.items() if installed(package)]
    missing = [name for name in _EXTRAS if name not in extras]
    yield ok(
        "extras", f"installed: {', '.join(extras) or 'none'}; not installed: {', '.join(missing) or 'none'}"
    )


def unmet(requirements: list[str] | None) -> Iterator[Finding]:
    """One problem for each requirement, extras apart, that is missing here or has another version."""
    for text in requirements or []:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        found = installed(wanted.name)
        if found is None:
            yield problem(
                "packages",
                f"{wanted.name} is not installed",
                f"pip install '{wanted.name}{wanted.specifier}'",
            )
        elif not wanted.specifier.contains(found, prereleases=True):
            yield problem(
                "packages",
                f"{wanted.name} {found} is here, {DISTRIBUTION} needs {wanted.specifier}",
                f"pip install '{wanted.name}{wanted.specifier}'",
            )


def installed(name: str) -> str | None:
    """The version of a distribution that is installed here."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def look_at_extension() -> Iterator[Finding]:
    answering = neighbours.answering()
    ours = sorted(name for name, module in answering.items() if module.startswith("metaflow_extensions.hf."))
    others = sorted(set(answering) - set(ours))
    names = ", ".join(f"@{name}" for name in ours)
    other = neighbours.other_version()
    if len(ours) < 3:
        lost = (
            ", ".join(f"@{name} is {answering[name]}" for name in others) or "they are not known to Metaflow"
        )
        yield problem(
            "extension",
            f"Metaflow does not take its decorators from {DISTRIBUTION}: {lost}",
            f"uninstall the package that gives them (pip uninstall {neighbours.OTHER}), or reinstall {DISTRIBUTION}",
        )
    elif other is not None:
        yield warning(
            "extension",
            f"{names} are {DISTRIBUTION}'s; {neighbours.OTHER} {other} is installed too and loses",
            f"pip uninstall {neighbours.OTHER}, unless you need what it stored",
        )
    else:
        yield ok("extension", f"{names} are {DISTRIBUTION}'s, nobody else gives them")
