"""A carry in host memory: copies to and from an accelerator, block by block, beside its computation.

Blocks come in through a ring of two staging areas on the device: while attention computes on one, the next is
on its way, and what it adds to the gradient of the past goes out, each direction on a stream of its own. The
device holds two blocks of one layer, however long the past is. Host memory is pinned.

Traffic of one exact step over S tokens in token chunks of C, with b bytes of keys and values a token: the
past of every token chunk is read for the first pass, for the pass with a graph, and backwards, where the
gradient of the past is read and written with it:

    to the device   4 b S²/2C        to the host   b S²/2C        (and b S for each chunk's own states)

It is counted in `loaded_bytes` and `stored_bytes`. On a CPU the copies are made in the same order at once.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from metaflow_hf.machine import usable_memory

_log = logging.getLogger("metaflow_hf.rollout")

_NUM_AREAS = 2


def can_offload(device: torch.device) -> bool:
    """Whether host memory is another one than that of `device`."""
    return device.type != "cpu"


class Staged:
    """Some blocks on their way to the device, in one staging area."""

    def __init__(self, transfers: HostTransfers, area: _Area, tensors: list[Tensor], arrived: Any) -> None:
        self._transfers = transfers
        self._area = area
        self._tensors = tensors
        self._arrived = arrived

    def wait(self) -> list[Tensor]:
        """The blocks on the device, for what is computed from now on; valid until `release`."""
        self._transfers.await_event(self._arrived)
        return self._tensors

    def release(self, *also: Any) -> None:
        """What has been computed so far was the last that uses the blocks, and `also` what these events tell of."""
        self._area.free = [self._transfers.event_of_computation(), *also]


class HostTransfers:
    """The copies of one carry between host memory and `device`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.loaded_bytes = 0
        self.stored_bytes = 0
        self._expected_bytes = 0
        self._rounded_bytes = 0
        self._warned = False
        self._module: Any = None if device.type == "cpu" else torch.get_device_module(device)
        self._loads: Any = self._module and self._module.Stream(device=device)
        self._stores: Any = self._module and self._module.Stream(device=device)
        self._areas = [_Area(device) for _ in range(_NUM_AREAS)]
        self._turn = 0

    def allocate(self, shape: tuple[int, int, int, int], dtype: torch.dtype, *, zero: bool) -> Tensor:
        """[B, heads, S, D] in host memory, the tokens outermost, so that a block of them is one piece."""
        make = torch.zeros if zero else torch.empty
        order = (shape[2], shape[0], shape[1], shape[3])
        return make(order, dtype=dtype, pin_memory=self._module is not None).permute(1, 2, 0, 3)

    def expect(self, nbytes: int) -> None:
        """So many more bytes of host memory will be asked for. Raises MemoryError as soon as there are not that many."""
        self._expected_bytes += nbytes
        self._rounded_bytes += 2 ** (max(nbytes, 1) - 1).bit_length()
        limit, whose = usable_memory()
        advice = "Shorter sequences, fewer rows a batch or gradient: truncated need less."
        if self._expected_bytes > limit:
            raise MemoryError(
                f"use_cpu_offload: the carry takes more than {self._expected_bytes / 2**30:.1f} GiB of host memory; "
                f"there are {limit / 2**30:.1f} GiB ({whose}). {advice}"
            )
        if self._rounded_bytes > limit and not self._warned:
            self._warned = True
            _log.warning(
                f"use_cpu_offload: torch rounds pinned memory up to powers of two, which makes more than "
                f"{self._rounded_bytes / 2**30:.1f} GiB of the carry; there are {limit / 2**30:.1f} GiB ({whose}). "
                f"PYTORCH_ALLOC_CONF=pinned_max_round_threshold_mb:64 leaves large blocks as they are. {advice}"
            )

    def stage(self, blocks: list[Tensor], after: list[Any]) -> Staged:
        """Begins to copy blocks of host tensors to the device, once the stores that `after` tells of are through."""
        area = self._areas[self._turn % _NUM_AREAS]
        self._turn += 1
        if area.make_room([block.nbytes for block in blocks]):
            area.free = [*area.free, self.event_of_computation()]  # whatever used that memory before
        tensors = [area.view(index, block) for index, block in enumerate(blocks)]
        for event in (*area.free, *after):
            if event is not None:
                self._loads.wait_event(event)
        with self._on(self._loads):
            for tensor, block in zip(tensors, blocks, strict=True):
                tensor.copy_(block, non_blocking=True)
                self.loaded_bytes += block.nbytes
        return Staged(self, area, tensors, self._loads and self._loads.record_event())

    def store(self, host: Tensor, states: Tensor) -> Any:
        """Begins to copy `states` to a block of a host tensor; an event of its end (None on a CPU)."""
        states = states.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)  # one piece, as the host has it
        event = self.event_of_computation()
        if event is not None:
            self._stores.wait_event(event)
        with self._on(self._stores):
            host.copy_(states, non_blocking=True)
        self.stored_bytes += host.nbytes
        if self._stores is None:
            return None
        states.record_stream(self._stores)
        return self._stores.record_event()

    def await_event(self, event: Any) -> None:
        """What is computed from now on comes after it."""
        if event is not None:
            self._module.current_stream(self.device).wait_event(event)

    def event_of_computation(self) -> Any:
        """An event of all that was computed so far; None on a CPU."""
        return self._module and self._module.current_stream(self.device).record_event()

    def _on(self, stream: Any) -> AbstractContextManager[Any]:
        return self._module.stream(stream) if self._module else nullcontext()


class _Area:
    """Memory on the device that blocks pass through; it grows to the largest that came."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: list[Tensor] = []
        self.free: list[Any] = []

    def make_room(self, sizes: list[int]) -> bool:
        """Whether it had to grow for blocks of so many bytes."""
        grown = False
        for index, size in enumerate(sizes):
            if index == len(self._buffers):
                self._buffers.append(torch.empty(0, dtype=torch.uint8, device=self._device))
            if self._buffers[index].numel() < size:
                self._buffers[index] = torch.empty(size, dtype=torch.uint8, device=self._device)
                grown = True
        return grown

    def view(self, index: int, block: Tensor) -> Tensor:
        """A tensor of the shape and layout of `block` [B, heads, T, D], uninitialised."""
        batch, heads, tokens, head = block.shape
        flat = self._buffers[index][: block.nbytes].view(block.dtype)
        return flat.view(tokens, batch, heads, head).permute(1, 2, 0, 3)
