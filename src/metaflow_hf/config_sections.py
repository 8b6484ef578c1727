"""The sections of a training configuration: what may stand in each, with defaults and limits.

Every section is frozen, strict and closed to unknown keys; what values may not stand together is checked where the
later of them is defined.
"""

import datetime as dt
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


class DatasetConfig(Section):
    """One dataset of a mixture.

    ``weight`` is its share of the samples, relative to the weights of the other datasets. Without weights each dataset
    is trained as a whole: its first ``max_samples`` rows, ``epochs`` times (default ``data.epochs``). ``name`` is for
    reports; default is the name of the repository or file. ``format``, ``columns`` and ``text_column`` are as in
    ``data``.
    """

    dataset: Annotated[str, Field(min_length=1)]
    name: Annotated[str, Field(min_length=1)] | None = None
    format: str = "auto"
    columns: dict[str, str] = {}
    text_column: str | None = None
    weight: PositiveFloat | None = None
    max_samples: PositiveInt | None = None
    epochs: PositiveInt | None = None

    @property
    def unpinned(self) -> str:
        """The dataset without the revision of a repository."""
        return self.dataset.partition("@")[0] if self.dataset.startswith("hf://") else self.dataset

    @property
    def title(self) -> str:
        """The name in reports."""
        if self.name is not None:
            return self.name
        if self.dataset.startswith("hf://"):
            return self.unpinned.removeprefix("hf://")
        return self.dataset.rstrip("/").rpartition("/")[2] or self.dataset

    @pydantic.model_validator(mode="after")
    def _one_naming(self) -> Self:
        if self.text_column is not None and self.columns:
            raise ValueError("text_column and columns both say which columns are trained: keep one of them")
        return self


class DataConfig(Section):
    """Which texts are trained, and how they become batches; ``dataset`` may come from a flow's parameter instead.

    ``datasets`` trains a mixture of several datasets in place of ``dataset``; ``format``, ``columns`` and
    ``text_column`` then describe the ``evaluation_dataset``.
    ``evaluation_dataset`` is held out for the evaluation: rows that say the same as one that is measured are not trained.
    Without one about ``heldout_samples`` rows are held out (``auto``: 256, but at most one in ten; always at least one in
    a thousand), chosen by the hash of what they say, so that copies of a row are on the same side.
    ``documents: whole`` makes each document one row, ``pages`` each page of a PDF.
    ``sequence_length`` is in tokens, ``batch_size`` in sequences. ``packing: isolated`` keeps the documents of one
    sequence from seeing each other; ``long_documents`` says what becomes of those longer than a sequence;
    ``loss_on`` says whose words are learned: answers (turns of the assistant, completions, outputs), or everything.
    ``format`` is that of the rows, ``columns`` names the column of each of its roles, ``text_column`` that of a format
    with one. ``chat_template`` (Jinja, a file, a directory with a tokenizer, or a name) replaces that of the tokenizer,
    ``template_date`` (YYYY-MM-DD) is the date that templates print; default is the day on which the lineage began.
    ``keep_columns`` names the columns that are stored beside those that are trained; without it all that JSON can hold are.
    """

    dataset: str | None = None
    datasets: list[DatasetConfig] = []
    format: str = "auto"
    columns: dict[str, str] = {}
    text_column: str | None = None
    chat_template: str | None = None
    template_date: str | None = None
    evaluation_dataset: str | None = None
    heldout_samples: PositiveInt | Literal["auto"] = "auto"
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
    documents: Literal["whole", "pages"] = "whole"
    keep_columns: list[str] | None = None

    @pydantic.field_validator("template_date")
    @classmethod
    def _date(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                dt.date.fromisoformat(value)
            except ValueError as error:
                raise ValueError("must be a date like 2026-01-31") from error
        return value

    @pydantic.model_validator(mode="after")
    def _one_naming(self) -> Self:
        if self.text_column is not None and self.columns:
            raise ValueError("text_column and columns both say which columns are trained: keep one of them")
        return self

    @pydantic.field_validator("datasets")
    @classmethod
    def _mixture(cls, value: list[DatasetConfig]) -> list[DatasetConfig]:
        if missing := [f"data.datasets[{i}]" for i, one in enumerate(value) if one.weight is None]:
            weighted = len(value) - len(missing)
            if weighted:
                raise ValueError(
                    f"{weighted} of {len(value)} datasets have a weight, but {', '.join(missing)} has none: give all "
                    "of them a weight, or none"
                )
        for what, names in (
            ("dataset", [one.unpinned for one in value]),
            ("name", [one.title for one in value]),
        ):
            for number, name in enumerate(names):
                if (first := names.index(name)) < number:
                    remedy = (
                        "train it more often by a larger epochs or weight"
                        if what == "dataset"
                        else "set another name"
                    )
                    raise ValueError(
                        f"data.datasets[{number}] has the same {what} as data.datasets[{first}], {name!r}: {remedy}"
                    )
        return value

    @pydantic.model_validator(mode="after")
    def _dataset_or_mixture(self) -> Self:
        if not self.datasets:
            return self
        if self.dataset is not None:
            raise ValueError("dataset and datasets both say what is trained: keep one of them")
        if self.max_samples is not None:
            raise ValueError("max_samples limits one dataset: set it in an item of datasets")
        named = [name for name in ("format", "columns", "text_column") if name in self.model_fields_set]
        named = [name for name in named if getattr(self, name) != type(self).model_fields[name].default]
        if named and self.evaluation_dataset is None:
            raise ValueError(f"{named[0]} describes the rows of one dataset: set it in an item of datasets")
        return self

    @property
    def title(self) -> str:
        """What people call the data that is trained; "" when nothing says."""
        return self.dataset or ", ".join(one.title for one in self.datasets)

    def only(self, number: int) -> "DataConfig":
        """The settings of dataset ``number`` of a mixture, as if it were trained alone."""
        one = self.datasets[number]
        return self.model_copy(
            update={
                "dataset": one.dataset,
                "datasets": [],
                "format": one.format,
                "columns": one.columns,
                "text_column": one.text_column,
                "max_samples": one.max_samples,
                "epochs": one.epochs or self.epochs,
            }
        )


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
