"""One architecture: built, probed, and, where the probe calls it exact, compared with full backpropagation in fp64."""

from __future__ import annotations

import inspect
import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaflow_hf.rollout import chunked_segment_rollout, probe_model
from zoo.families import build
from zoo.fp64 import fp64_inside

LENGTH = 41
TOLERANCE = 1e-10
OPTIONS: tuple[dict[str, Any], ...] = (
    {"chunk_size": 7},
    {"chunk_size": 32},
    {"chunk_size": 7, "gradient_checkpointing": True},
)

Outcome = Literal["exact", "refused", "wrong", "not built"]


@dataclass(frozen=True)
class Trial:
    """What became of an architecture. `detail`: the largest relative error, or the reason."""

    family: str
    outcome: Outcome
    detail: str
    seconds: float


def try_family(family: str) -> Trial:
    """Gradients of rows with padding at either end, in token chunks, against one pass; or why there are none."""
    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    started = time.perf_counter()
    with warnings.catch_warnings(), fp64_inside(), _fp64_by_default():
        warnings.simplefilter("ignore")
        outcome, detail = _outcome(family)
    return Trial(family, outcome, " ".join(detail.split()), time.perf_counter() - started)


@contextmanager
def _fp64_by_default() -> Iterator[None]:
    """Tensors that models make without saying of what type are then of the type of their parameters."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _outcome(family: str) -> tuple[Outcome, str]:
    try:
        model = build(family)
    except Exception as error:  # what transformers raises for a configuration is anything
        return "not built", f"{type(error).__name__}: {error}"
    model = _fit_for_comparison(model)
    report = probe_model(model, refresh=True)
    if not report.exact:
        return "refused", "; ".join(report.reasons)
    ids = torch.randint(3, 60, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    batch = padded_batch(model, ids)
    expected_loss, expected = _one_pass(model, batch)
    worst = 0.0
    for options in OPTIONS:
        loss, _ = chunked_segment_rollout(model, batch, backward=True, **options)
        error = max(relative_error(_gradients(model), expected), abs(float(loss) / expected_loss - 1))
        if not error <= TOLERANCE:
            return "wrong", f"{options}: gradients differ by {error:.1e}"
        worst = max(worst, error)
    return "exact", f"{worst:.1e}"


def relative_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of a parameter's gradient, relative to its norm; inf where one is missing.

    Norms far below the largest (1e-6) count as that: gradients that are zero but for rounding.
    """
    if set(found) != set(expected):
        return float("inf")
    least = 1e-6 * max(float(gradient.norm()) for gradient in expected.values())
    return max(
        float((found[name] - gradient).norm()) / max(float(gradient.norm()), least)
        for name, gradient in expected.items()
    )


def _fit_for_comparison(model: nn.Module) -> nn.Module:
    """In fp64 and training mode; vectors random, so that no bias or norm is without effect."""
    model = model.double().train()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and "A_log" not in name and "dt_bias" not in name:
            nn.init.normal_(parameter, std=0.3, mean=0.5)
    return model


def padded_batch(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Three rows of ids: whole, padded on the left by more than a token chunk, padded on the right."""
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    mask[2, -11:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, 11] = -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if "position_ids" in inspect.signature(model.forward).parameters:
        batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return batch


def _one_pass(model: nn.Module, batch: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs, use_cache=False).logits
    targets = batch["labels"][:, 1:].flatten()
    total = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="sum")
    loss = total / (targets != -100).sum()
    loss.backward()
    return float(loss.detach()), _gradients(model)


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found
