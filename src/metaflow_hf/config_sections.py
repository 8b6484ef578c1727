"""The sections of a training configuration: what may stand in each, with defaults and limits.

Every section is frozen, strict and closed to unknown keys; what values may not stand together is checked where the
later of them is defined.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from metaflow_hf.errors import ConfigError

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base of all sections: frozen, strict, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


def local_directory(name: str) -> Path | None:
    """The local directory that ``name`` means: a path such as ``./model``, ``/models/mine`` or ``~/mine``.

    ``None`` for anything else, which is the id of a repository (``owner/name``). Looks at the name only.
    """
    if (
        name.startswith(("./", "../", "/", "~"))
        or name in (".", "..")
        or name.count("/") > 1
        or name.endswith("/")
    ):
        return Path(name).expanduser()
    return None


def existing_directory(directory: Path | None, name: str | None) -> Path:
    """The directory that ``local_directory`` found in ``name``. Raises ``ConfigError`` where there is none."""
    if directory is not None and directory.is_dir():
        return directory
    found = "is a file" if directory is not None and directory.exists() else "does not exist here"
    raise ConfigError(
        f"model.repo_id: the directory {name!r} {found}. Name a directory with a model (a relative path begins where the run is "
        "started), or a repository of the hub as owner/name."
    )


class LoraConfig(Section):
    """Low-rank adapters instead of full training (needs the extra ``peft``).

    ``save: merged`` folds them into the model that comes out, ``adapter`` leaves a directory that peft loads on top of
    the base model.
    """

    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    dropout: Fraction = 0.0
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    save: Literal["merged", "adapter"] = "merged"


class ModelConfig(Section):
    """Which model is trained, and from which weights; ``repo_id`` may come from a flow's parameter instead.

    ``repo_id`` is a repository of the hub (``owner/name``), or the path of a local directory (``./model``), which the run
    stores once and uses from there.
    ``reference`` continues from a model of this datastore: the key of a reference, a run (``TrainFlow/17``, whose
    artifact ``model`` it is) or a flow (its latest successful run). ``initialise: random`` takes only the architecture
    and the tokenizer of ``repo_id``, with the values of ``architecture`` in place of those in its config.json. ``dtype`` is that of the computation and of the model that comes out; what is trained is
    held in fp32. ``compile`` is torch.compile.
    """

    repo_id: str | None = None
    revision: str = "main"
    reference: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    initialise: Literal["pretrained", "random"] = "pretrained"
    architecture: dict[str, Any] = {}
    lora: LoraConfig | None = None
    compile: bool = False
    trust_remote_code: bool = False
    allow_pickle: bool = False

    @property
    def name(self) -> str:
        """What people call the model that training begins with; "" when nothing says. Of a path the last part."""
        if self.directory is not None:
            return self.directory.resolve().name
        return self.repo_id or self.reference or ""

    @property
    def directory(self) -> Path | None:
        """The local directory that ``repo_id`` names; ``None`` for a repository of the hub, or without one."""
        return local_directory(self.repo_id) if self.repo_id else None

    @pydantic.model_validator(mode="after")
    def _one_beginning(self) -> Self:
        if self.reference is not None and self.repo_id is not None:
            raise ValueError("repo_id and reference both say where to begin: keep one of them")
        if self.architecture and self.initialise == "pretrained":
            raise ValueError("architecture changes the shape of the weights: set initialise: random")
        if self.initialise == "random" and self.lora is not None:
            raise ValueError(
                "adapters on random weights learn nothing of use: take initialise: pretrained, or no lora"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _pinned(self) -> Self:
        # A directory and a stored model are what they are; a branch may come to mean other code.
        is_fixed = self.directory is not None or (self.reference or "").startswith("models/")
        if self.trust_remote_code and not is_fixed and not re.fullmatch(r"[0-9a-f]{40}", self.revision):
            raise ValueError(
                "with trust_remote_code the revision must be a full commit hash (40 hex digits), so that the code that "
                "runs is the code that you read"
            )
        return self


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
    """The inner optimiser: AdamW with a warmup and a schedule over the run's tokens.

    ``adamw_8bit`` keeps its moments in 8 bits (needs the extra ``bitsandbytes``). A step takes
    ``gradient_accumulation_steps`` batches, as one batch that large would. Weights decay in matrices only, embeddings
    included unless ``decay_embeddings`` is false. ``schedule: wsd`` stays at the peak and falls during the last
    ``decay_fraction`` of the run; all but ``constant`` end at ``final_fraction`` of the peak. ``max_grad_norm: null``
    clips nothing. ``on_non_finite`` says what becomes of a step whose loss or gradients are not finite.
    """

    name: Literal["adamw", "adamw_8bit"] = "adamw"
    learning_rate: PositiveFloat = 2e-4
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    decay_embeddings: bool = True
    max_grad_norm: PositiveFloat | None = 1.0
    gradient_accumulation_steps: PositiveInt = 1
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup_fraction: Fraction = 0.02
    decay_fraction: Fraction = 0.1
    final_fraction: Fraction = 0.1
    on_non_finite: Literal["stop", "skip"] = "stop"

    @pydantic.field_validator("betas", mode="before")
    @classmethod
    def _pair(cls, value: Any) -> Any:
        # YAML and Metaflow's configuration values know lists only.
        return tuple(value) if isinstance(value, list) else value

    @pydantic.model_validator(mode="after")
    def _time_for_both(self) -> Self:
        if self.schedule == "wsd" and self.warmup_fraction + self.decay_fraction > 1:
            raise ValueError(
                f"warmup_fraction {self.warmup_fraction:g} and decay_fraction {self.decay_fraction:g} are more than the "
                "whole run together"
            )
        return self


class RoundsConfig(Section):
    """How workers share the work: the length of a round, and how its contributions become one model.

    ``ema_half_life`` keeps an exponential moving average of the weights: after so many tokens what a round had learned
    counts half (a tenth of ``max_tokens`` is a good one). ``seconds`` is the time box of a round, ``solo_start`` the fraction of the tokens that one worker trains
    alone first, which only a randomly initialised model needs, ``grace_seconds`` how long a claim in hand may go on
    when the machine is to be taken away (the upload comes after that). ``workers`` are branches; each takes
    ``gpus_per_worker`` GPUs, which share its batches (``parallel: ddp``) or its weights as well (``fsdp``). ``share_gpus``
    allows more workers than this machine has GPUs for.
    """

    workers: PositiveInt = 1
    gpus_per_worker: PositiveInt = 1
    parallel: Literal["ddp", "fsdp"] = "ddp"
    share_gpus: bool = False
    max_tokens: PositiveInt | None = None
    claim_samples: PositiveInt | Literal["auto"] = "auto"
    seconds: PositiveFloat = 60.0
    merge: Literal["diloco", "average"] = "diloco"
    outer_learning_rate: PositiveFloat = 0.7
    outer_momentum: Fraction = 0.6
    encoding: Literal["int8", "fp32"] = "int8"
    ema_half_life: PositiveInt | None = None
    max_failures: PositiveInt = 5
    on_failure: Literal["stop", "skip"] = "stop"
    keep: Literal["recent", "all"] = "recent"
    solo_start: Fraction = 0.0
    grace_seconds: Annotated[float, Field(ge=0)] = 10.0


class EarlyStopConfig(Section):
    """Training ends when ``patience`` measurements in a row are not better than the best before them, by more than
    ``min_improvement`` nats per token.
    """

    patience: PositiveInt = 3
    min_improvement: Annotated[float, Field(ge=0)] = 0.0


class HarnessConfig(Section):
    """Tasks of lm-evaluation-harness that the model is given before and after training (needs the extra ``lm-eval``).

    ``limit`` is the number of examples of each task, all without it; ``include_path`` a directory of tasks of your own.
    """

    tasks: Annotated[list[str], Field(min_length=1)]
    num_fewshot: NonNegativeInt | None = None
    limit: PositiveInt | None = None
    batch_size: PositiveInt = 8
    include_path: str | None = None


ModelKind = Literal["last", "best", "ema"]


class EvaluationConfig(Section):
    """What is measured and sampled, before and after training and, with ``every_rounds``, after every so many rounds.

    ``model`` says which weights the run's model has: those of the last round, those of the round with the lowest
    held-out loss, or the moving average of ``rounds.ema_half_life``.
    """

    max_samples: PositiveInt = 256
    every_rounds: PositiveInt | None = None
    early_stop: EarlyStopConfig | None = None
    harness: HarnessConfig | None = None
    model: ModelKind = "last"
    prompts: list[str] = []
    max_new_tokens: PositiveInt = 64
    temperature: Annotated[float, Field(ge=0)] = 0.8
    seed: int = 0

    @pydantic.model_validator(mode="after")
    def _measured(self) -> Self:
        if self.every_rounds is None and self.early_stop is not None:
            raise ValueError(
                "early_stop needs every_rounds: after how many rounds the held-out loss is measured"
            )
        if self.every_rounds is None and self.model == "best":
            raise ValueError(
                "model: best needs every_rounds: after how many rounds the held-out loss is measured"
            )
        return self


class ResourcesConfig(Section):
    """What a branch of training gets on a cluster, in the words of Metaflow's ``@resources``; a run on this machine
    takes no notice. ``gpu`` is by default as many as ``rounds.gpus_per_worker``; ``memory`` is in megabytes.
    """

    gpu: NonNegativeInt = 1
    cpu: PositiveInt = 4
    memory: PositiveInt = 16_000


Tracker = Literal["tensorboard", "trackio", "wandb", "mlflow"]


class ReportConfig(Section):
    """How progress is shown, and to which trackers it goes as well: a line in the log every ``interval_seconds``, a new
    drawing of the card of a running step at least ``card_seconds`` after the last.
    """

    interval_seconds: PositiveFloat = 10.0
    card_seconds: PositiveFloat = 30.0
    trackers: list[Tracker] = []


class PublishConfig(Section):
    """Where the model of a finished run is pushed on the hub, with a model card; nowhere without ``repo_id``.

    ``private`` counts for a repository that does not exist yet. The token comes from the environment (HF_TOKEN).
    """

    repo_id: str | None = None
    revision: str | None = None
    private: bool | None = None
    dry_run: bool = False

    @pydantic.field_validator("repo_id")
    @classmethod
    def _name(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"([\w.-]+/)?[\w.-]+", value):
            raise ValueError("must be the name of a repository (owner/name)")
        return value
