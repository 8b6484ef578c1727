"""The state of torch's random generators, so that a recomputation draws the numbers of the first pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RngState:
    """States of the CPU generator and, for a model on an accelerator, of its device's generator."""

    cpu: Tensor
    device: torch.device
    accelerator: Tensor | None

    @classmethod
    def capture(cls, device: torch.device) -> RngState:
        accelerator = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
        return cls(torch.get_rng_state(), device, accelerator)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            torch.get_device_module(self.device).set_rng_state(self.accelerator, self.device)


@contextmanager
def rng_kept(device: torch.device) -> Iterator[None]:
    """Whatever is drawn inside, the generators go on afterwards as if it had not been."""
    state = RngState.capture(device)
    try:
        yield
    finally:
        state.restore()
