"""The same held-out text and prompts under two models, beside what needs no training."""

import math
import textwrap
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from metaflow_hf.config import TrainConfig
from metaflow_hf.data.formats import Example
from metaflow_hf.data.formats.examples import show
from metaflow_hf.data.mixture import MixedBlocks, ReadableBlocks
from metaflow_hf.data.tokens import ExampleEncoder
from metaflow_hf.events import ClaimDone, Evaluated, Event, Sampled, StepDone
from metaflow_hf.report import UnigramModel, xz_bits_per_byte
from metaflow_hf.report.outcome import Outcome, Plan, TaskResult, WorstRow
from metaflow_hf.train.encoding import example_encoder, row_format, training_tokenizer
from metaflow_hf.train.evaluation import Evaluation, Passage, passages
from metaflow_hf.train.harness import run_harness
from metaflow_hf.train.heldout import held_out, measured_rows, training_samples
from metaflow_hf.train.measuring import evaluated, measure
from metaflow_hf.train.mixture_plan import dataset_results
from metaflow_hf.train.mixtures import describe_parts
from metaflow_hf.train.models import load_model
from metaflow_hf.train.sides import HeldOutRow, example_of

UNIGRAM_ROWS: Final = 20_000
WORST_ROWS: Final = 5
EXCERPT: Final = 200  # characters


def compare(
    base_dir: Path,
    model_dir: Path,
    *,
    training: ReadableBlocks,
    heldout: ReadableBlocks | None,
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
        datasets=dataset_results(plan, model["metadata"], measured, found["before"], found["after"]),
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
    training: ReadableBlocks,
    heldout: ReadableBlocks | None,
    read: Sequence[Passage],
    encoder: ExampleEncoder,
    config: TrainConfig,
    measured: Evaluated,
) -> Evaluated:
    """The held-out tokens, each by its frequency in (at most ``UNIGRAM_ROWS`` rows of) the text that was trained."""
    sizes = training_samples([block.sample_count for block in training.manifest.blocks], config)
    rows = _first_rows(training, enumerate(sizes), UNIGRAM_ROWS)
    if isinstance(training, MixedBlocks):
        rows = _first_rows_of_each(training, sizes, config)
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


def _first_rows(
    blocks: ReadableBlocks, sizes: Iterable[tuple[int, int]], wanted: int
) -> list[dict[str, Any]]:
    """The first ``wanted`` rows of blocks given as (block id, rows)."""
    rows: list[dict[str, Any]] = []
    for block_id, size in sizes:
        rows += blocks.read_rows(block_id, 0, min(size, wanted - len(rows)))
    return rows


def _first_rows_of_each(
    blocks: MixedBlocks, sizes: Sequence[int], config: TrainConfig
) -> list[dict[str, Any]]:
    """Rows of each dataset of a mixture, in proportion to what is trained."""
    described = describe_parts(blocks, config)
    total = sum(one["rows"] for one in described)
    rows = []
    for number, one in enumerate(described):
        ids = blocks.blocks_of(number)
        found = _first_rows(blocks, ((i, sizes[i]) for i in ids), UNIGRAM_ROWS * one["rows"] // total)
        # A dataset that is trained several times counts as often.
        times = one["rows"] * min(UNIGRAM_ROWS / total, 1.0) / len(found) if found else 0
        rows += found * max(round(times), 1)
    return rows


def _seconds(events: Sequence[Event]) -> float:
    """Wall clock from the first step's beginning to the last step's end, over all workers."""
    steps = [event for event in events if isinstance(event, StepDone)]
    if not steps:
        return 0.0
    ends = [event.time for event in events if isinstance(event, (StepDone, ClaimDone))]
    return max(ends) - min(step.time - step.seconds for step in steps)
