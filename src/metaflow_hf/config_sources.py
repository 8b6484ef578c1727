"""Where each value of a configuration comes from: the file, a flow's parameter, or a default."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from metaflow_hf.config import TOP_LEVEL_KEYS, TrainConfig


@dataclass(frozen=True, slots=True)
class Setting:
    """One value by its path (``data.batch_size``), and who said so; "" for a default."""

    path: str
    value: Any
    source: str


def settings_of(
    config: TrainConfig, given: Mapping[str, Any], *, where: str, before: TrainConfig | None = None
) -> list[Setting]:
    """Every value of ``config``, in its order.

    ``given`` is what the file ``where`` holds, ``before`` the configuration in it before parameters took the place of
    some values.
    """
    written = set(_flat(_nested(given)))
    said = _flat((before or config).model_dump(mode="json"))
    settings = []
    for path, value in _flat(config.model_dump(mode="json")).items():
        source = where if any(_covers(key, path) for key in written) else ""
        if said.get(path) != value:
            source = "parameter"
        settings.append(Setting(path, value, source))
    return settings


def _nested(given: Mapping[str, Any]) -> dict[str, Any]:
    """The flat spellings in their sections."""
    nested = {key: value for key, value in given.items() if key not in TOP_LEVEL_KEYS}
    for key in TOP_LEVEL_KEYS.keys() & given.keys():
        section = TOP_LEVEL_KEYS[key]
        nested[section] = {**(nested.get(section) or {}), key: given[key]}
    return nested


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _covers(written: str, path: str) -> bool:
    return path == written or path.startswith(f"{written}.")
