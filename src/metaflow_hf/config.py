"""The training configuration: strict, frozen, and clear about every mistake at once.

A configuration is YAML (or the JSON that Metaflow makes of it) with the sections below. Unknown keys and wrong
values are listed together, each with its path, what was given, what is allowed and the nearest spelling. The
keys ``samples_per_block``, ``dataset_chunk_size``, ``use_chunked_training`` and ``chunk_size`` may also stand
at the top level.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Self

import pydantic
import yaml

from metaflow_hf.config_data import DataConfig, DatasetConfig
from metaflow_hf.config_mistakes import describe
from metaflow_hf.config_sections import (
    EarlyStopConfig,
    EvaluationConfig,
    HarnessConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    PublishConfig,
    ReportConfig,
    ResourcesConfig,
    RolloutConfig,
    RoundsConfig,
    Section,
    Tracker,
)
from metaflow_hf.errors import ConfigError

__all__ = [
    "DataConfig",
    "DatasetConfig",
    "EarlyStopConfig",
    "EvaluationConfig",
    "HarnessConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PublishConfig",
    "ReportConfig",
    "ResourcesConfig",
    "RolloutConfig",
    "RoundsConfig",
    "Tracker",
    "TrainConfig",
    "load_config",
    "parse_yaml",
    "read_yaml",
]

# The seed's flat spelling: key -> the section where it lives.
TOP_LEVEL_KEYS: Final[Mapping[str, str]] = {
    "samples_per_block": "data",
    "dataset_chunk_size": "data",
    "use_chunked_training": "rollout",
    "chunk_size": "rollout",
}


class TrainConfig(Section):
    """The whole configuration. ``hub`` is ``embedded``, an endpoint's URL, or absent for the environment's."""

    hub: str | None = None
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    rounds: RoundsConfig = RoundsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    report: ReportConfig = ReportConfig()
    publish: PublishConfig = PublishConfig()
    resources: ResourcesConfig = ResourcesConfig()

    @pydantic.model_validator(mode="before")
    @classmethod
    def _a_gpu_for_each_process(cls, values: Any) -> Any:
        rounds, resources = values.get("rounds", {}), values.get("resources", {})
        if not isinstance(rounds, Mapping) or not isinstance(resources, Mapping) or "gpu" in resources:
            return values
        wanted = rounds.get("gpus_per_worker")
        if not isinstance(wanted, int) or wanted < 2:
            return values
        return {**values, "resources": {**resources, "gpu": wanted}}

    @pydantic.field_validator("hub")
    @classmethod
    def _endpoint(cls, value: str | None) -> str | None:
        if value not in (None, "embedded") and not str(value).startswith(("http://", "https://")):
            raise ValueError("must be 'embedded' or the URL of a hub (http://… or https://…)")
        return value

    @pydantic.field_validator("evaluation")
    @classmethod
    def _averaged(cls, value: EvaluationConfig, info: pydantic.ValidationInfo) -> EvaluationConfig:
        rounds = info.data.get("rounds")
        if value.model == "ema" and rounds is not None and rounds.ema_half_life is None:
            raise ValueError(
                "model: ema needs rounds.ema_half_life: after how many tokens earlier weights count half"
            )
        return value

    @classmethod
    def parse(cls, values: Mapping[str, Any], *, where: str = "configuration") -> Self:
        """The configuration in ``values``. Raises ``ConfigError`` that lists every mistake with its path."""
        moved, clashes = _move_top_level_keys(values)
        mistakes = clashes
        try:
            config = cls.model_validate(moved)
        except pydantic.ValidationError as error:
            mistakes = [*clashes, *describe(error, cls, top_level_keys=tuple(TOP_LEVEL_KEYS))]
            config = None
        if mistakes or config is None:
            lines = "\n".join(f"  {line}" for line in mistakes)
            count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
            raise ConfigError(f"{where}: {count}\n{lines}")
        return config

    def replace(self, **sections: Mapping[str, Any]) -> Self:
        """The same configuration with some values of some sections changed, validated again."""
        values = self.model_dump()
        for section, changes in sections.items():
            values[section] = {**values[section], **changes}
        return self.parse(values)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, except that 2e-4 is a number, as everybody expects."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse_yaml(text: str, *, where: str = "configuration") -> dict[str, Any]:
    """YAML or JSON text as a dict. Raises ``ConfigError`` with the line."""
    try:
        values = yaml.load(text, Loader=_Loader)  # noqa: S506  a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{where}{place}: not readable as YAML: {problem}.") from error
    if values is None:
        raise ConfigError(f"{where}: is empty; expected sections such as 'model:' and 'data:'.")
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected sections such as 'model:' and 'data:', found {values!r:.80}.")
    return values


def read_yaml(path: Path) -> dict[str, Any]:
    """What a YAML file holds. Raises ``ConfigError``, also for a file that cannot be read."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from error
    return parse_yaml(text, where=path.name)


def load_config(path: Path) -> TrainConfig:
    """The configuration in a YAML file. Raises ``ConfigError``, also for a file that cannot be read."""
    return TrainConfig.parse(read_yaml(path), where=path.name)


_SECTIONS: Final = frozenset(name for name in TrainConfig.model_fields if name != "hub")


def _move_top_level_keys(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    # A section with nothing but comments is null in YAML.
    moved: dict[str, Any] = {
        key: {} if value is None and key in _SECTIONS else value for key, value in values.items()
    }
    clashes = []
    for key, section in TOP_LEVEL_KEYS.items():
        if key not in moved:
            continue
        target = moved.get(section, {})
        if not isinstance(target, Mapping):
            continue
        if key in target:
            clashes.append(f"{key}: given at the top level and as {section}.{key}; keep one of them")
        moved[section] = {**target, key: moved.pop(key)}
    return moved, clashes
