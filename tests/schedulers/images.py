"""The Python environment of a pod's image: a few distributions and what they require, and nothing else.

A directory of links to this environment's packages, so that it is made in a second. Inside a pod it is mounted as
`IMAGE`, and the packages as `PACKAGES`, where the links lead to.
"""

import sysconfig
import venv
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

IMAGE = Path("/mnt/image")
PACKAGES = Path("/mnt/packages")
# What Metaflow installs into every container, unless the image says that it is there.
INSTALLED_BY_METAFLOW = ("boto3", "requests")
# These come with the code package, or not at all.
NEVER_IN_AN_IMAGE = frozenset({"metaflow", "metaflow-hf"})


@dataclass(frozen=True)
class Image:
    """`root` is mounted as `IMAGE`."""

    root: Path

    @classmethod
    def build(
        cls,
        root: Path,
        requirements: Iterable[str] = (),
        *,
        packages: Path = PACKAGES,
        without: Collection[str] = NEVER_IN_AN_IMAGE,
    ) -> "Image":
        """An environment with these distributions, beside what Metaflow installs itself. With `packages()` as
        `packages` it works outside of pods as well.
        """
        venv.EnvBuilder(symlinks=True, with_pip=False).create(root)
        [site] = root.glob("lib/python*/site-packages")
        for name in {
            entry
            for found in _closure([*requirements, *INSTALLED_BY_METAFLOW], without)
            for entry in _entries(found)
        }:
            (site / name).symlink_to(packages / name)
        return cls(root)

    @classmethod
    def with_our_requirements(cls, root: Path) -> "Image":
        """What `pip install` brings for this project, without the project and without Metaflow."""
        return cls.build(root, ["metaflow-hf"])

    @staticmethod
    def packages() -> Path:
        """Where the packages of this environment lie."""
        return Path(sysconfig.get_path("purelib"))


def _closure(requirements: Iterable[str], without: Collection[str]) -> list[Distribution]:
    found: dict[str, Distribution] = {}
    waiting = [(requirement, "") for requirement in requirements]
    while waiting:
        text, extra = waiting.pop()
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        if name not in found:
            found[name] = distribution(name)
            waiting += [(other, "") for other in found[name].requires or ()]
        for chosen in requirement.extras:
            waiting += [(other, chosen) for other in found[name].requires or () if "extra" in other]
    return [each for name, each in found.items() if name not in without]


def _entries(found: Distribution) -> Iterator[str]:
    """The names in site-packages that a distribution consists of."""
    for file in found.files or ():
        if file.parts[0] not in ("..", "__pycache__"):
            yield file.parts[0]
