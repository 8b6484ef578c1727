"""The same held-out text and prompts under two models, beside what needs no training."""

import math
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from metaflow_hf.config import TrainConfig
from metaflow_hf.data import BlockManager
from metaflow_hf.data.formats import Example
from metaflow_hf.data.formats.examples import show
from metaflow_hf.data.tokens import ExampleEncoder
from metaflow_hf.events import ClaimDone, Evaluated, Event, Sampled, StepDone
from metaflow_hf.report import UnigramModel, xz_bits_per_byte
from metaflow_hf.report.outcome import Outcome, Plan, TaskResult, WorstRow
from metaflow_hf.train.encoding import example_encoder, row_format, training_tokenizer
from metaflow_hf.train.evaluation import Evaluation, Passage, passages
from metaflow_hf.train.harness import run_harness
from metaflow_hf.train.heldout import (
    HeldOutRow,
    example_of,
    held_out,
    measured_rows,
    training_samples,
)
from metaflow_hf.train.measuring import evaluated, measure
from metaflow_hf.train.models import load_model

UNIGRAM_ROWS: Final = 20_000
WORST_ROWS: Final = 5
EXCERPT: Final = 200  # characters


def compare(
    base_dir: Path,
    model_dir: Path,
    *,
    training: BlockManager,
    heldout: BlockManager | None,
    config: TrainConfig,
    plan: Plan,
    model: Mapping[str, Any],
    events: Sequence[Event],
    run: str,
) -> Outcome:
    """Loss, perplexity, bits per byte and samples of the model before (``base_dir``) and after (``model_dir``).

    ``events`` are those of all workers, ``run`` is the pathspec of the run.
    """
    tokenizer = training_tokenizer(model_dir, config)
    measured = measured_rows(training, heldout, config)
    texts = [row.value for row in measured]
    encoder = example_encoder(tokenizer, row_format(training, config), config)
    read = passages(texts, encoder)
    figures: dict[str, Evaluated] = {}
    found: dict[str, Evaluation] = {}
    tasks: dict[str, dict[tuple[str, str], float]] = {}
    samples: list[Sampled] = []
    for name, directory in (("before", base_dir), ("after", model_dir)):
        # What training began with: fresh weights where those were asked for.
        network = load_model(
            directory,
            config.model,
            seed=config.data.seed,
            initialise=None if name == "before" else False,
            base_dir=base_dir,
        )
        network.to("cuda" if torch.cuda.is_available() else "cpu")
        look = measure(network, tokenizer, texts, config)
        found[name] = look.evaluation
        if config.evaluation.harness is not None:
            tasks[name] = run_harness(network, tokenizer, config.evaluation.harness)
        figures[name] = evaluated(name, look.evaluation, look.counted)
        samples += [
            Sampled(time=time.time(), name=name, prompt=prompt, text=text) for prompt, text in look.samples
        ]
    return Outcome(
        plan=plan,
        before=figures["before"],
        after=figures["after"],
        unigram=_unigram(training, heldout, read, encoder, config, figures["after"]),
        xz_bits_per_byte=xz_bits_per_byte([passage.text for passage in read]),
        samples=tuple(samples),
        worst=_worst(measured, found["before"], found["after"]),
        tasks=tuple(
            TaskResult(task=task, metric=metric, before=tasks["before"][task, metric], after=after)
            for (task, metric), after in tasks.get("after", {}).items()
        ),
        model=dict(model),
        tokens=int(model["metadata"]["tokens"]),
        seconds=_seconds(events),
        skipped_positions=int(model["metadata"]["positions_skipped"]),
        run_pathspec=run,
    )


def _worst(rows: Sequence[HeldOutRow], before: Evaluation, after: Evaluation) -> tuple[WorstRow, ...]:
    """The rows that the trained model predicts worst, beside what the untrained one made of them."""
    earlier = {one.index: one.loss for one in before.documents}
    return tuple(
        WorstRow(
            place=str(rows[one.index]),
            text=_excerpt(rows[one.index].value),
            loss=one.loss,
            loss_before=earlier.get(one.index),
            tokens=one.tokens,
        )
        for one in after.worst(WORST_ROWS)
    )


def _excerpt(example: Example) -> str:
    return textwrap.shorten(show(example), EXCERPT, placeholder=" …")


def _unigram(
    training: BlockManager,
    heldout: BlockManager | None,
    read: Sequence[Passage],
    encoder: ExampleEncoder,
    config: TrainConfig,
    measured: Evaluated,
) -> Evaluated:
    """The held-out tokens, each by its frequency in (at most ``UNIGRAM_ROWS`` rows of) the text that was trained."""
    rows: list[dict[str, Any]] = []
    for block_id, samples in enumerate(
        training_samples([block.sample_count for block in training.manifest.blocks], config)
    ):
        rows += training.read_rows(block_id, 0, min(samples, UNIGRAM_ROWS - len(rows)))
    sides = held_out(training, heldout, config)
    values = [
        value
        for row in rows
        if (value := example_of(row, encoder.format)) is not None and not sides.holds(value)
    ]
    trained = passages(values, encoder)
    model = UnigramModel([passage.predicted for passage in trained], len(encoder.tokenizer))
    loss = model.loss([passage.predicted for passage in read])
    return Evaluated(
        time=time.time(),
        name="unigram",
        counted=measured.counted,
        loss=loss,
        perplexity=math.exp(loss),
        bits_per_byte=loss / math.log(2) * measured.tokens / measured.bytes,
        tokens=measured.tokens,
        bytes=measured.bytes,
    )


def _seconds(events: Sequence[Event]) -> float:
    """Wall clock from the first step's beginning to the last step's end, over all workers."""
    steps = [event for event in events if isinstance(event, StepDone)]
    if not steps:
        return 0.0
    ends = [event.time for event in events if isinstance(event, (StepDone, ClaimDone))]
    return max(ends) - min(step.time - step.seconds for step in steps)
