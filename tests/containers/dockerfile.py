"""A Dockerfile, instruction by instruction."""

import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .filesystem import Root

_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


@dataclass
class Image:
    """What a stage has become."""

    root: Root
    environment: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, str] = field(default_factory=dict)
    directory: str = "/"
    user: str = "0"
    command: list[str] = field(default_factory=list)


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """Names and arguments, with continued lines in one and comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line.strip():
            name, _, rest = line.strip().partition(" ")
            yield name.upper(), rest.strip()


class Build:
    """Builds all stages; ``after`` is called with each finished RUN's image and command."""

    def __init__(
        self,
        place: Path,
        context: Path,
        *,
        arguments: Mapping[str, str],
        environment: Mapping[str, str],
        secrets: Mapping[str, str],
        hide: Sequence[Path],
        share: Mapping[str, Path],
        after: Callable[[Image, str], None],
    ) -> None:
        self._place = place
        self._context = context
        self._given = arguments
        self._environment = environment
        self._secrets = secrets
        self._hide = hide
        self._share = share
        self._after = after
        self._global: dict[str, str] = {}
        self.images: dict[str, Image] = {}
        self.output = ""

    def run(self, text: str) -> Image:
        """The last stage."""
        image: Image | None = None
        for name, rest in instructions(text):
            if name == "FROM":
                image = self._begin(rest)
            elif image is None:
                assert name == "ARG", name
                self._argument(self._global, rest)
            else:
                getattr(self, f"_{name.lower()}")(image, rest)
        assert image is not None
        return image

    def close(self) -> None:
        for image in reversed(self.images.values()):
            image.root.close()

    def _begin(self, rest: str) -> Image:
        base, _, name = self._expand(rest, self._global).partition(" AS ")
        below = self.images.get(base)
        root = Root(self._place / name, below.root if below else None, hide=self._hide, share=self._share)
        image = Image(root)
        if below:
            image.environment = dict(below.environment)
            image.directory, image.user = below.directory, below.user
        self.images[name] = image
        return image

    def _argument(self, known: dict[str, str], rest: str) -> None:
        name, has_default, default = rest.partition("=")
        value = self._given.get(name, " ".join(shlex.split(default)) if has_default else None)
        if value is not None:
            known[name] = value

    def _arg(self, image: Image, rest: str) -> None:
        self._argument(image.arguments, rest)

    def _env(self, image: Image, rest: str) -> None:
        known = self._known(image)
        for pair in shlex.split(rest):
            name, _, value = pair.partition("=")
            image.environment[name] = self._expand(value, known)

    def _workdir(self, image: Image, rest: str) -> None:
        image.directory = rest
        image.root.of(rest).mkdir(parents=True, exist_ok=True)

    def _user(self, image: Image, rest: str) -> None:
        image.user = rest

    def _cmd(self, image: Image, rest: str) -> None:
        image.command = json.loads(rest)

    def _copy(self, image: Image, rest: str) -> None:
        words = shlex.split(self._expand(rest, self._known(image)))
        flags = dict(word.removeprefix("--").split("=") for word in words if word.startswith("--"))
        *sources, target = [word for word in words if not word.startswith("--")]
        if not target.startswith("/"):
            target = f"{image.directory}/{target.removeprefix('./')}"
        origin = self.images[flags["from"]].root.path if "from" in flags else self._context
        for source in sources:
            image.root.copy(origin / source.lstrip("/"), target, flags.get("chown", ""))

    def _run(self, image: Image, rest: str) -> None:
        secrets = {}
        while rest.startswith("--mount=type=secret,"):
            mount, _, rest = rest.partition(" ")
            options = dict(option.split("=") for option in mount.removeprefix("--mount=").split(","))
            if options["id"] in self._secrets:
                secrets[options["env"]] = self._secrets[options["id"]]
            rest = rest.strip()
        self.output += image.root.run(
            ["/bin/sh", "-c", rest],
            {**self._environment, **self._known(image), **secrets},
            directory=image.directory,
            user=image.user,
            timeout=1500,
        )
        self._after(image, rest)

    def _known(self, image: Image) -> dict[str, str]:
        from .filesystem import PATH

        return {"PATH": PATH, **image.arguments, **image.environment}

    def _expand(self, text: str, known: Mapping[str, str]) -> str:
        return _VARIABLE.sub(lambda match: known.get(match[1] or match[2], ""), text)


def copy_context(source: Path, target: Path, ignored: str) -> None:
    """What a build sees of a directory: all that ``.dockerignore`` does not leave out."""
    rules = [
        (not line.startswith("!"), _pattern(line.removeprefix("!").strip("/")))
        for line in map(str.strip, ignored.splitlines())
        if line and not line.startswith("#")
    ]

    def is_ignored(path: str) -> bool:
        left_out = False
        for leaves_out, pattern in rules:
            if pattern.fullmatch(path):
                left_out = leaves_out
        return left_out

    def leave_out(directory: str, names: list[str]) -> set[str]:
        below = Path(directory).relative_to(source)
        return {name for name in names if is_ignored((below / name).as_posix())}

    shutil.copytree(source, target, ignore=leave_out, symlinks=True)


def _pattern(glob: str) -> re.Pattern[str]:
    parts = re.split(r"(\*\*/|\*)", glob)
    translated = {"**/": "(?:.*/)?", "*": "[^/]*"}
    # What a name says holds for what is below it too.
    return re.compile("".join(translated.get(part, re.escape(part)) for part in parts) + "(?:/.*)?")
