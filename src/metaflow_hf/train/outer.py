"""The outer step: how the contributions of one round become one model. Pure functions on single tensors.

The weighted mean of the changes, negated, is a gradient; ``nesterov`` takes one step of
``torch.optim.SGD(nesterov=True)`` along it, on fp32 weights, with the momentum of the rounds before. Weights of a
lineage are fp32, so they are their own master copy.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class OuterStep(Protocol):
    """How one parameter moves: base, changes and their weights, momentum -> new value, new momentum."""

    def __call__(
        self, base: Tensor, changes: Sequence[Tensor], tokens: Sequence[int], momentum: Tensor | None, /
    ) -> tuple[Tensor, Tensor | None]: ...


def mean_change(changes: Sequence[Tensor], tokens: Sequence[int]) -> Tensor:
    """The mean of the changes, weighted by tokens, summed in the given order."""
    total = sum(tokens)
    mean = torch.zeros_like(changes[0], dtype=torch.float32)
    for change, count in zip(changes, tokens, strict=True):
        mean.add_(change, alpha=count / total)
    return mean


def nesterov(learning_rate: float, momentum_factor: float) -> OuterStep:
    """The outer optimiser of DiLoCo."""

    def step(
        base: Tensor, changes: Sequence[Tensor], tokens: Sequence[int], momentum: Tensor | None, /
    ) -> tuple[Tensor, Tensor | None]:
        gradient = mean_change(changes, tokens).neg_()
        buffer = gradient if momentum is None else momentum.mul(momentum_factor).add_(gradient)
        direction = gradient.add(buffer, alpha=momentum_factor)
        return base.sub(direction, alpha=learning_rate), buffer

    return step


def average(
    base: Tensor, changes: Sequence[Tensor], tokens: Sequence[int], momentum: Tensor | None, /
) -> tuple[Tensor, Tensor | None]:
    """Plain averaging: the base moves by the mean change; no state."""
    return base + mean_change(changes, tokens), momentum
