"""Where the past of an attention layer lies: keys and values of a whole sequence, and the gradient they collect."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class KVSlot:
    """One tensor of the carry (the keys, or the values, of one layer) and the gradient that it collects.

    `home` is where the buffers lie; None means beside the model's own states.
    """

    def __init__(self, num_tokens: int, home: torch.device | None, with_gradient: bool) -> None:
        self.num_tokens = num_tokens
        self._home = home
        self._with_gradient = with_gradient
        self.states: Tensor | None = None
        self.gradient: Tensor | None = None

    def write(self, start: int, states: Tensor) -> None:
        """Stores `states` [B, heads, C, head_dim] at tokens [start, start + C)."""
        if self.states is None:
            shape = (*states.shape[:2], self.num_tokens, states.shape[3])
            self.states = self._empty(shape, states)
        self.states[:, :, start : start + states.shape[2]].copy_(states)

    def read(self, start: int, stop: int, like: Tensor) -> Tensor:
        """Tokens [start, stop) on the device of `like`; a view without version counter where none is copied."""
        assert self.states is not None
        return self.states[:, :, start:stop].data.to(like.device, non_blocking=True)

    def bytes_per_token(self) -> int:
        """Bytes of the states of one token, all rows and heads."""
        assert self.states is not None
        return self.states.nbytes // self.num_tokens

    def width(self) -> int:
        """The head size."""
        assert self.states is not None
        return self.states.shape[3]

    def zeros(self, length: int, like: Tensor) -> Tensor:
        """Zeros for `length` tokens [B, heads, length, head_dim] of the type and device of `like`."""
        assert self.states is not None
        batch, heads, _, width = self.states.shape
        return like.new_zeros(batch, heads, length, width)

    def is_beside(self, device: torch.device) -> bool:
        """Whether the states lie on this device."""
        assert self.states is not None
        return self.states.device == device

    def add_gradient(self, start: int, gradient: Tensor, row: int | None = None) -> None:
        """Adds what a later token chunk sends back to tokens [start, start + C), of one row or of all."""
        if not self._with_gradient or not gradient.shape[2]:
            return
        if self.gradient is None:
            assert self.states is not None
            self.gradient = torch.zeros_like(self.states)
        part = self.gradient[rows(row), :, start : start + gradient.shape[2]]
        part.add_(gradient.to(part.device, part.dtype))

    def gradient_of(self, start: int, own: Tensor) -> Tensor:
        """`own` plus what all later token chunks sent back to the same tokens."""
        if self.gradient is None:
            return own
        return own + self.gradient[:, :, start : start + own.shape[2]].to(own.device, own.dtype)

    def nbytes(self) -> int:
        """Bytes of the states and of their gradient, allocated already or not."""
        assert self.states is not None
        return self.states.nbytes * (2 if self._with_gradient else 1)

    def _empty(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        home = self._home or like.device
        return torch.empty(shape, dtype=like.dtype, device=home, pin_memory=home != like.device)


class ReadPast(torch.autograd.Function):
    """current [B, heads, stop - start, head_dim] -> past and current [B, heads, stop - first, head_dim].

    A view of the slot's buffer: the past is never copied or concatenated. Backwards, what the chunk sends to
    its past is added to the slot's gradient; what later chunks sent to its own tokens is added to its own.
    """

    @staticmethod
    def forward(ctx: Any, current: Tensor, slot: KVSlot, first: int, start: int, write: bool) -> Tensor:
        ctx.slot, ctx.first, ctx.start = slot, first, start
        if write:
            slot.write(start, current)
        return slot.read(first, start + current.shape[2], current)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = gradients
        past = ctx.start - ctx.first
        ctx.slot.add_gradient(ctx.first, gradient[:, :, :past])
        return ctx.slot.gradient_of(ctx.start, gradient[:, :, past:]), None, None, None, None


class CarriedPast:
    """What a layer's attention needs beside its current keys and values: the slots, and where the chunk begins.

    It travels on the tensors of current keys and values from the cache to the attention function.
    """

    def __init__(self, layer: Any, carry: Any, start: int, first_visible: int) -> None:
        self.keys: KVSlot
        self.values: KVSlot
        self.keys, self.values = layer.slots
        self.carry = carry
        self.start = start
        self._layer = layer
        self._first_visible = first_visible

    def taken(self) -> None:
        """The attention function has it: nothing of the past is lost."""
        self._layer.waits_for_attention = False

    def current(self, key: Tensor, value: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What to keep of the current states: nothing where the slots, on the same device, hold them as well."""
        return (None, None) if self.keys.is_beside(key.device) else (key, value)

    def read(
        self, k0: int, k1: int, current: tuple[Tensor | None, ...], like: Tensor, row: int | None
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of tokens [k0, k1), all of them in the past or all of them current."""
        if k0 >= self.start and current[0] is not None:
            keys, values = (states[:, :, k0 - self.start : k1 - self.start] for states in current)  # type: ignore[index]
        else:
            keys, values = (slot.read(k0, k1, like) for slot in (self.keys, self.values))
        return keys[rows(row)], values[rows(row)]

    def whole(self, key: Tensor, value: Tensor, first: int | None) -> tuple[Tensor, Tensor]:
        """Past and current keys and values as one view each, from `first` on (None: from the first visible)."""
        begin = self._first_visible if first is None else first
        keys, values = (
            ReadPast.apply(current, slot, begin, self.start, False)
            for current, slot in ((key, self.keys), (value, self.values))
        )
        return keys, values


def rows(row: int | None) -> slice:
    """The index of one row that keeps its dimension, or of all."""
    return slice(None) if row is None else slice(row, row + 1)
