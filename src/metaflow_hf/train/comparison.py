"""The same held-out text and prompts under two models, beside what needs no training."""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from metaflow_hf.config import TrainConfig
from metaflow_hf.data import BlockManager
from metaflow_hf.events import ClaimDone, Evaluated, Event, Sampled, StepDone
from metaflow_hf.report import UnigramModel, xz_bits_per_byte
from metaflow_hf.report.outcome import Outcome, Plan
from metaflow_hf.train.evaluation import Evaluation, Passage, evaluate, passages
from metaflow_hf.train.generation import generate
from metaflow_hf.train.heldout import first_texts, heldout_texts, value_of
from metaflow_hf.train.models import load_model, load_tokenizer
from metaflow_hf.train.spec import training_samples

UNIGRAM_ROWS: Final = 20_000


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
    tokenizer = load_tokenizer(model_dir, trust_remote_code=config.model.trust_remote_code)
    texts = (
        heldout_texts(training, config)
        if heldout is None
        else first_texts(heldout, config.evaluation.max_samples)
    )
    read = passages(texts, tokenizer, loss_on=config.data.loss_on)
    some = config.data.loss_on == "assistant" and not all(isinstance(text, str) for text in texts)
    figures: dict[str, Evaluated] = {}
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
        evaluation = evaluate(
            network,
            texts,
            tokenizer,
            sequence_length=config.data.sequence_length,
            loss_on=config.data.loss_on,
        )
        figures[name] = _evaluated(name, evaluation, "assistant" if some else "")
        samples += _samples(name, network, tokenizer, config)
    return Outcome(
        plan=plan,
        before=figures["before"],
        after=figures["after"],
        unigram=_unigram(training, read, tokenizer, config, figures["after"]),
        xz_bits_per_byte=xz_bits_per_byte([passage.text for passage in read]),
        samples=tuple(samples),
        model=dict(model),
        tokens=int(model["metadata"]["tokens"]),
        seconds=_seconds(events),
        skipped_positions=int(model["metadata"]["positions_skipped"]),
        run_pathspec=run,
    )


def _samples(name: str, network: nn.Module, tokenizer: Any, config: TrainConfig) -> list[Sampled]:
    settings = config.evaluation
    texts = generate(
        network,
        settings.prompts,
        tokenizer,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        seed=settings.seed,
    )
    return [
        Sampled(time=time.time(), name=name, prompt=prompt, text=text)
        for prompt, text in zip(settings.prompts, texts, strict=True)
    ]


def _unigram(
    training: BlockManager, read: Sequence[Passage], tokenizer: Any, config: TrainConfig, measured: Evaluated
) -> Evaluated:
    """The held-out tokens, each by its frequency in (at most ``UNIGRAM_ROWS`` rows of) the text that was trained."""
    column = config.data.text_column or training.text_column
    rows: list[dict[str, Any]] = []
    for block_id, samples in enumerate(
        training_samples([block.sample_count for block in training.manifest.blocks], config)
    ):
        rows += training.read_rows(block_id, 0, min(samples, UNIGRAM_ROWS - len(rows)))
    values = [value for row in rows if (value := value_of(row, column)) is not None]
    trained = passages(values, tokenizer, loss_on=config.data.loss_on)
    model = UnigramModel([passage.predicted for passage in trained], len(tokenizer))
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


def _evaluated(name: str, evaluation: Evaluation, counted: str) -> Evaluated:
    return Evaluated(
        time=time.time(),
        name=name,
        counted=counted,
        loss=evaluation.loss,
        perplexity=evaluation.perplexity,
        bits_per_byte=evaluation.bits_per_byte,
        tokens=evaluation.tokens,
        bytes=evaluation.bytes,
    )


def _seconds(events: Sequence[Event]) -> float:
    """Wall clock from the first step's beginning to the last step's end, over all workers."""
    steps = [event for event in events if isinstance(event, StepDone)]
    if not steps:
        return 0.0
    ends = [event.time for event in events if isinstance(event, (StepDone, ClaimDone))]
    return max(ends) - min(step.time - step.seconds for step in steps)
