"""What a report says besides events: the plan before training, and the outcome at its end.

Both are plain frozen values, so that a flow keeps them as artifacts and a card in another process is drawn
from them. Nothing here is computed: whoever knows a number writes it down.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from metaflow_hf.events import Evaluated, Sampled


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run is going to do, known before the first step.

    ``tokens``, ``steps``, ``rounds``, ``memory_bytes`` (of one worker) and ``seconds`` are estimates; ``memory`` are its
    bytes by part, ``disk`` those that the run stores, by what they are for. ``steps`` counts the steps of all workers
    together. ``trainable_parameters`` is None when all of them are trained. ``notes`` are sentences for people (what was
    chosen and why, warnings); ``configuration`` is YAML with every setting, ``versions`` are (package, version) of what
    reads it. ``rows`` are those of the dataset, of which ``samples`` are trained, ``heldout_rows`` held out and ``skipped`` (by
    reason) neither, ``heldout_samples`` are those that are measured; ``format`` and ``columns`` (role -> column) say how they are read,
    ``labelled_fraction`` which share of their tokens carries loss, ``batch_sequences`` how many sequences a step takes on
    average. ``is_exact`` says that these were counted, not estimated. ``example`` is one rendered sequence in runs of
    text with and without loss. ``datasets`` are those of a mixture: name, dataset, rows and tokens that a run trains,
    and the share of all rows. 0, None and "" mean: not known, and
    the line is left out.
    """

    base_model: str
    dataset: str
    model_commit: str = ""
    dataset_commit: str = ""
    parameters: int = 0
    trainable_parameters: int | None = None
    samples: int = 0
    heldout_samples: int = 0
    tokens: int = 0
    claims: int = 0
    claim_samples: int = 0
    steps: int = 0
    rounds: int = 0
    workers: int = 1
    batch_size: int = 0
    sequence_length: int = 0
    memory_bytes: int = 0
    memory: Mapping[str, int] = field(default_factory=dict)
    disk: Mapping[str, int] = field(default_factory=dict)
    seconds: float | None = None
    lineage: str = ""
    notes: tuple[str, ...] = ()
    format: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    rows: int = 0
    heldout_rows: int = 0
    skipped: Mapping[str, int] = field(default_factory=dict)
    labelled_fraction: float = 0.0
    batch_sequences: float = 0.0
    is_exact: bool = False
    example: tuple[tuple[bool, str], ...] = ()
    datasets: tuple[Mapping[str, Any], ...] = ()
    configuration: str = ""
    versions: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class WorstRow:
    """A held-out row that the trained model predicts badly: where it lies, how it begins, losses in nats per token."""

    place: str
    text: str
    loss: float
    loss_before: float | None
    tokens: int


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One figure of one task of lm-evaluation-harness, before and after training."""

    task: str
    metric: str
    before: float
    after: float


@dataclass(frozen=True, kw_only=True)
class DatasetResult:
    """One dataset of a mixture: ``rows`` and ``tokens`` (with loss) that were trained, and the ``share`` of all rows.

    Losses are those of its held-out rows in nats per token, before and after training, over ``measured_tokens``;
    ``None`` where no row of it was measured.
    """

    name: str
    rows: int
    share: float
    tokens: int
    loss_before: float | None = None
    loss_after: float | None = None
    measured_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run achieved.

    ``before`` and ``after`` are the same held-out text measured on the untrained and the trained model,
    ``unigram`` the same text under a unigram model of the training tokens, ``xz_bits_per_byte`` what ``xz -9``
    needs for it. ``datasets`` are those of a mixture. ``worst`` are the held-out rows that the trained model predicts worst, worst first, ``tasks`` what lm-evaluation-harness says. ``samples`` are named ``before`` and ``after`` and pair up by prompt. ``model`` is the model's
    reference (a plain dict), ``seconds`` the wall clock of the training, ``card`` the card's path or address,
    ``run_pathspec`` (``TrainFlow/17``) and ``artifact`` where the reference can be found again.
    """

    plan: Plan
    before: Evaluated | None = None
    after: Evaluated | None = None
    unigram: Evaluated | None = None
    xz_bits_per_byte: float | None = None
    samples: tuple[Sampled, ...] = ()
    datasets: tuple[DatasetResult, ...] = ()
    worst: tuple[WorstRow, ...] = ()
    tasks: tuple[TaskResult, ...] = ()
    model: Mapping[str, Any] | None = None
    tokens: int = 0
    seconds: float = 0.0
    skipped_positions: int = 0
    card: str = ""
    run_pathspec: str = ""
    artifact: str = "model"


def sample_pairs(samples: tuple[Sampled, ...]) -> list[tuple[str, str | None, str | None]]:
    """(prompt, text before, text after) in the order of the first sample of each prompt."""
    pairs: dict[str, dict[str, str]] = {}
    for sample in samples:
        pairs.setdefault(sample.prompt, {})[sample.name] = sample.text
    return [(prompt, texts.get("before"), texts.get("after")) for prompt, texts in pairs.items()]


def load_snippet(outcome: Outcome) -> str:
    """Python lines that load the trained model in any notebook, flow or process; "" without a reference."""
    if outcome.model is None:
        return ""
    if outcome.run_pathspec:
        return (
            "from metaflow import Run, load_model\n\n"
            f'reference = Run("{outcome.run_pathspec}").data.{outcome.artifact}\n'
            'load_model(reference, "my-model")'
        )
    return f'from metaflow import load_model\n\nload_model("{outcome.model["key"]}", "my-model")'
