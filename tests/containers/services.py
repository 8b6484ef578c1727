"""The services of a compose file, each as a command in a fresh container of its image."""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compose_spec import PyOptions

from .dockerfile import Image
from .filesystem import Root, copy_of_volume

_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


def services(text: str, variables: Mapping[str, str]) -> dict[str, Any]:
    """The services with variables filled in. Raises ``ValueError`` for what the Compose Specification forbids."""
    filled = _VARIABLE.sub(lambda match: variables.get(match[1]) or match[2] or "", text)
    compose = PyOptions(apply_merge=True).from_yaml(filled)
    compose.validate()
    found: dict[str, Any] = compose.to_dict()["services"]
    return found


def run_service(
    service: Mapping[str, Any],
    image: Image,
    place: Path,
    volumes: Path,
    *,
    more: tuple[str, ...] = (),
    environment: Mapping[str, str] | None = None,
    timeout: float = 500,
) -> str:
    """What the service's command prints. ``more`` are arguments behind it, ``environment`` is that of a network that
    containers would not share with this machine.
    """
    root = Root(place, image.root)
    try:
        for volume in service.get("volumes", ()):
            name, target = _volume(volume)
            copy_of_volume(root, target, volumes / name)
        command = service.get("command") or image.command
        words = shlex.split(command) if isinstance(command, str) else list(command)
        return root.run(
            [*words, *more],
            {**image.environment, **(environment or {}), **_environment(service)},
            directory=image.directory,
            user=image.user,
            timeout=timeout,
        )
    finally:
        root.close()


def _volume(volume: Any) -> tuple[str, str]:
    if isinstance(volume, str):
        name, _, target = volume.partition(":")
        return name, target
    return volume["source"], volume["target"]


def _environment(service: Mapping[str, Any]) -> dict[str, str]:
    given = service.get("environment") or {}
    if isinstance(given, list):
        given = dict(item.split("=", 1) for item in given)
    return {name: str(value) for name, value in given.items() if value not in (None, "")}
