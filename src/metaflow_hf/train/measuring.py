"""One look at a model: held-out figures, and what it writes after the prompts of the configuration."""

import time
from collections.abc import Callable
from typing import Any

from torch import nn

from metaflow_hf.config import TrainConfig
from metaflow_hf.data.formats import Example
from metaflow_hf.data.mixture import ReadableBlocks
from metaflow_hf.events import Evaluated
from metaflow_hf.train.encoding import template_date
from metaflow_hf.train.evaluation import Evaluation, evaluate
from metaflow_hf.train.generation import generate
from metaflow_hf.train.heldout import measured_rows
from metaflow_hf.train.validation import Measured


def measure(model: nn.Module, tokenizer: Any, texts: list[Example], config: TrainConfig) -> Measured:
    """The figures on ``texts`` and the samples, with the lengths, seeds and counts of the configuration."""
    settings = config.evaluation
    data = config.data
    figures = evaluate(
        model,
        texts,
        tokenizer,
        sequence_length=data.sequence_length,
        packing=data.packing,
        loss_on=data.loss_on,
        on_bad_row=data.on_bad_row,
        template_date=template_date(config),
    )
    written = generate(
        model,
        settings.prompts,
        tokenizer,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        seed=settings.seed,
    )
    spoken = config.data.loss_on == "assistant" and not all(isinstance(text, str) for text in texts)
    return Measured(
        figures,
        tuple(zip(settings.prompts, written, strict=True)),
        "assistant" if spoken else "",
    )


def measuring(
    model: nn.Module,
    tokenizer: Any,
    training: ReadableBlocks,
    heldout: ReadableBlocks | None,
    config: TrainConfig,
) -> Callable[[], Measured]:
    """``measure`` of a model that changes; the held-out rows are read when it is first asked."""
    texts: list[Example] = []

    def look() -> Measured:
        if not texts:
            texts.extend(row.value for row in measured_rows(training, heldout, config))
        return measure(model, tokenizer, texts, config)

    return look


def evaluated(name: str, found: Evaluation, counted: str) -> Evaluated:
    """The figures as reports take them."""
    return Evaluated(
        time=time.time(),
        name=name,
        counted=counted,
        loss=found.loss,
        perplexity=found.perplexity,
        bits_per_byte=found.bits_per_byte,
        tokens=found.tokens,
        bytes=found.bytes,
    )
