"""The training configuration: strict, frozen, and clear about every mistake at once.

A configuration is YAML (or the JSON that Metaflow makes of it) with the sections below. Unknown keys and wrong
values are listed together, each with its path, what was given, what is allowed and the nearest spelling. The
keys ``samples_per_block``, ``dataset_chunk_size``, ``use_chunked_training`` and ``chunk_size`` may also stand
at the top level.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field

from metaflow_hf.config_mistakes import describe
from metaflow_hf.errors import ConfigError

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base of all sections: frozen, strict, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class LoraConfig(Section):
    """Low-rank adapters instead of full training (needs the extra ``peft``)."""

    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    dropout: Fraction = 0.0
    target_modules: list[str] | Literal["all-linear"] = "all-linear"


class ModelConfig(Section):
    """Which model is trained, and from which weights; ``repo_id`` may come from a flow's parameter instead."""

    repo_id: str | None = None
    revision: str = "main"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    initialise: Literal["pretrained", "random"] = "pretrained"
    lora: LoraConfig | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False

    @pydantic.model_validator(mode="after")
    def _pinned(self) -> Self:
        if self.trust_remote_code and not re.fullmatch(r"[0-9a-f]{40}", self.revision):
            raise ValueError(
                "with trust_remote_code the revision must be a full commit hash (40 hex digits), so that the code that "
                "runs is the code that you read"
            )
        return self


class DataConfig(Section):
    """Which texts are trained, and how they become batches; ``dataset`` may come from a flow's parameter instead.

    ``evaluation_dataset`` is held out for the evaluation; without one the last ``heldout_samples`` rows are.
    ``sequence_length`` is in tokens, ``batch_size`` in sequences. ``packing: isolated`` keeps the documents of one
    sequence from seeing each other; ``long_documents`` says what becomes of those longer than a sequence;
    ``loss_on`` says whose turns of a conversation are learned.
    """

    dataset: str | None = None
    text_column: str | None = None
    evaluation_dataset: str | None = None
    heldout_samples: PositiveInt = 256
    samples_per_block: PositiveInt = 100_000
    dataset_chunk_size: PositiveInt | Literal["auto"] = "auto"
    sequence_length: Annotated[int, Field(ge=2)] = 1024
    batch_size: PositiveInt = 8
    packing: bool | Literal["isolated"] = True
    long_documents: Literal["split", "truncate", "drop"] = "split"
    loss_on: Literal["assistant", "all"] = "assistant"
    shuffle: bool = True
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    epochs: PositiveInt = 1
    max_samples: PositiveInt | None = None
    on_bad_row: Literal["raise", "skip"] = "raise"


class RolloutConfig(Section):
    """How sequences longer than ``chunk_size`` tokens are trained: through the chunked rollout, unless
    ``use_chunked_training`` is ``false``.

    With ``auto`` documents are cut at ``data.sequence_length`` as they are without it; ``true`` keeps documents
    longer than that whole, up to the positions that the model knows.
    """

    use_chunked_training: bool | Literal["auto"] = "auto"
    chunk_size: PositiveInt | Literal["auto"] = "auto"
    gradient: Literal["exact", "truncated"] = "exact"
    use_cpu_offload: bool = False
    gradient_checkpointing: bool = False


class OptimizerConfig(Section):
    """The inner optimiser: AdamW with a warmup and a schedule over the run's tokens."""

    learning_rate: PositiveFloat = 2e-4
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    max_grad_norm: PositiveFloat = 1.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_fraction: Fraction = 0.02
    final_fraction: Fraction = 0.1

    @pydantic.field_validator("betas", mode="before")
    @classmethod
    def _pair(cls, value: Any) -> Any:
        # YAML and Metaflow's configuration values know lists only.
        return tuple(value) if isinstance(value, list) else value


class RoundsConfig(Section):
    """How workers share the work: the length of a round, and how its contributions become one model.

    ``seconds`` is the time box of a round, ``solo_start`` the fraction of the tokens that one worker trains
    alone first, which only a randomly initialised model needs, ``grace_seconds`` how long a claim in hand may go on
    when the machine is to be taken away (the upload comes after that).
    """

    workers: PositiveInt = 1
    max_tokens: PositiveInt | None = None
    claim_samples: PositiveInt | Literal["auto"] = "auto"
    seconds: PositiveFloat = 60.0
    merge: Literal["diloco", "average"] = "diloco"
    outer_learning_rate: PositiveFloat = 0.7
    outer_momentum: Fraction = 0.6
    encoding: Literal["int8", "fp32"] = "int8"
    max_failures: PositiveInt = 5
    on_failure: Literal["stop", "skip"] = "stop"
    keep: Literal["recent", "all"] = "recent"
    solo_start: Fraction = 0.0
    grace_seconds: Annotated[float, Field(ge=0)] = 10.0


class EvaluationConfig(Section):
    """What is measured and sampled, before and after."""

    max_samples: PositiveInt = 256
    prompts: list[str] = []
    max_new_tokens: PositiveInt = 64
    temperature: Annotated[float, Field(ge=0)] = 0.8
    seed: int = 0


Tracker = Literal["tensorboard", "trackio", "wandb", "mlflow"]


class ReportConfig(Section):
    """How progress is shown, and to which trackers it goes as well."""

    interval_seconds: PositiveFloat = 10.0
    trackers: list[Tracker] = []


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

    @pydantic.field_validator("hub")
    @classmethod
    def _endpoint(cls, value: str | None) -> str | None:
        if value not in (None, "embedded") and not str(value).startswith(("http://", "https://")):
            raise ValueError("must be 'embedded' or the URL of a hub (http://… or https://…)")
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
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected sections such as 'model:' and 'data:', found {values!r:.80}.")
    return values


def parse_config(text: str) -> dict[str, Any]:
    """YAML or JSON text as the dict of a valid ``TrainConfig``; for Metaflow's ``Config(parser=…)``.

    So that mistakes are told before a run begins. Raises ``ConfigError``.
    """
    values = parse_yaml(text)
    TrainConfig.parse(values)
    return values


def load_config(path: Path) -> TrainConfig:
    """The configuration in a YAML file. Raises ``ConfigError``, also for a file that cannot be read."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from error
    return TrainConfig.parse(parse_yaml(text, where=path.name), where=path.name)


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
