"""Several sequences of one batch, one after the other: packed documents, each group with its own carry."""

from __future__ import annotations

import torch
from torch import Tensor

from metaflow_hf.rollout.passes import ChunkPasses


class PartPasses:
    """The passes of a batch's parts as if they were one. Sums of losses; the caller divides.

    Either `losses` and later `backward`, or `losses_and_backward`, which holds one part's carry at a time; each once.
    """

    used_segments = 1

    def __init__(self, parts: list[ChunkPasses], device: torch.device) -> None:
        self._parts = parts
        self._device = device
        self._carry_bytes: int | None = None
        self.num_chunks = sum(part.num_chunks for part in parts)

    def carry_bytes(self) -> int:
        """The most bytes of carry and its gradient that there were at a time."""
        if self._carry_bytes is not None:
            return self._carry_bytes
        return sum(part.carry_bytes() for part in self._parts)

    def losses(self) -> Tensor:
        """Sum of the losses, without a graph."""
        return self._sum([part.losses() for part in self._parts])

    def backward(self, scale: Tensor) -> None:
        """Adds the gradients of (scale × sum of losses) to every `.grad`, after `losses`."""
        for part in self._parts:
            part.backward(scale)

    def losses_and_backward(self, scale: Tensor) -> Tensor:
        """Both at once, part by part."""
        sums, self._carry_bytes = [], 0
        while self._parts:
            part = self._parts.pop(0)
            sums.append(part.losses_and_backward(scale))
            self._carry_bytes = max(self._carry_bytes, part.carry_bytes())
        return self._sum(sums)

    def _sum(self, sums: list[Tensor]) -> Tensor:
        return torch.stack(sums).sum() if sums else torch.zeros((), device=self._device)
