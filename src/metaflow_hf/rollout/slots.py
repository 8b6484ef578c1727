"""Where the past of an attention layer lies: keys and values of a whole sequence, and the gradient they collect."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from metaflow_hf.rollout.host_memory import HostTransfers, Staged
from metaflow_hf.rollout.visibility import Span


class KVSlot:
    """One tensor of the carry (the keys, or the values, of one layer) and the gradient that it collects.

    Both are [B, heads, S, head_dim], beside the model's own states or, with `transfers`, in host memory.
    """

    def __init__(self, num_tokens: int, transfers: HostTransfers | None, with_gradient: bool) -> None:
        self.num_tokens = num_tokens
        self.transfers = transfers
        self._with_gradient = with_gradient
        self._stored: Any = None
        self._gradient_stored: Any = None
        self.states: Tensor | None = None
        self.gradient: Tensor | None = None

    def write(self, start: int, states: Tensor) -> None:
        """Stores `states` [B, heads, C, head_dim] at tokens [start, start + C)."""
        if self.states is None:
            shape = (*states.shape[:2], self.num_tokens, states.shape[3])
            if self.transfers is not None:
                for _ in range(2 if self._with_gradient else 1):
                    self.transfers.expect(math.prod(shape) * states.itemsize)
            self.states = self._empty(shape, states)
        part = self.states[:, :, start : start + states.shape[2]]
        if self.transfers is None:
            part.copy_(states)
        else:
            self._stored = self.transfers.store(part, states)

    def read(self, start: int, stop: int) -> Tensor:
        """Tokens [start, stop) on the model's device; without copy and version counter where they lie there."""
        assert self.states is not None
        part = self.states[:, :, start:stop].data
        if self.transfers is None:
            return part
        staged = self.transfers.stage([part], [self._stored])
        states = staged.wait()[0].clone()
        staged.release()
        return states

    def stage(self, start: int, stop: int, *, with_gradient: bool) -> tuple[list[Tensor], list[Any]]:
        """What to bring in from the host for these tokens, and the stores that must be through before."""
        assert self.states is not None
        blocks, after = [self.states[:, :, start:stop]], [self._stored]
        if with_gradient:
            blocks.append(self._gradient_buffer()[:, :, start:stop])
            after.append(self._gradient_stored)
        return blocks, after

    def add_gradient(self, start: int, gradient: Tensor, row: int | None = None) -> None:
        """Adds what a later token chunk sends back to tokens [start, start + C), of one row or of all."""
        if not self._with_gradient or not gradient.shape[2]:
            return
        part = self._gradient_buffer()[:, :, start : start + gradient.shape[2]]
        if self.transfers is None:
            part[rows(row)].add_(gradient)
            return
        staged = self.transfers.stage([part], [self._gradient_stored])
        staged.release(self.store_gradient(start, staged.wait()[0], gradient, row))

    def store_gradient(self, start: int, sum_so_far: Tensor, gradient: Tensor, row: int | None) -> Any:
        """Adds to a gradient that was brought in, and sends it back to the host; an event of the end of that."""
        assert self.transfers is not None
        sum_so_far[rows(row)].add_(gradient)
        part = self._gradient_buffer()[:, :, start : start + gradient.shape[2]]
        self._gradient_stored = self.transfers.store(part, sum_so_far)
        return self._gradient_stored

    def gradient_of(self, start: int, own: Tensor) -> Tensor:
        """`own` plus what all later token chunks sent back to the same tokens."""
        if self.gradient is None:
            return own
        part = self.gradient[:, :, start : start + own.shape[2]]
        if self.transfers is None:
            return own + part.to(own.dtype)
        staged = self.transfers.stage([part], [self._gradient_stored])
        total = own + staged.wait()[0].to(own.dtype)
        staged.release()
        return total

    @property
    def with_gradient(self) -> bool:
        """Whether gradients of the past are collected."""
        return self._with_gradient

    def nbytes(self) -> int:
        """Bytes of the states and of their gradient, allocated already or not."""
        assert self.states is not None
        return self.states.nbytes * (2 if self._with_gradient else 1)

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

    def _gradient_buffer(self) -> Tensor:
        assert self.states is not None
        if self.gradient is None:
            self.gradient = self._empty(tuple(self.states.shape), self.states, zero=True)
        return self.gradient

    def _empty(self, shape: Any, like: Tensor, *, zero: bool = False) -> Tensor:
        if self.transfers is not None:
            return self.transfers.allocate(shape, like.dtype, zero=zero)
        return like.new_zeros(shape) if zero else like.new_empty(shape)


class HandedOn(torch.autograd.Function):
    """The current states [B, heads, C, head_dim] as they are; backwards, with what later chunks sent to them.

    Once for all that read them: several layers may share these keys and values.
    """

    @staticmethod
    def forward(ctx: Any, current: Tensor, slot: KVSlot, start: int, write: bool) -> Tensor:
        ctx.slot, ctx.start = slot, start
        if write:
            slot.write(start, current)
        return current.view_as(current)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.slot.gradient_of(ctx.start, gradients[0]), None, None, None


class ReadPast(torch.autograd.Function):
    """current [B, heads, stop - start, head_dim] -> past and current [B, heads, stop - first, head_dim].

    A view of the slot's buffer, which holds the current ones as well: the past is never copied or concatenated.
    Backwards, what the chunk sends to its past is added to the slot's gradient.
    """

    @staticmethod
    def forward(ctx: Any, current: Tensor, slot: KVSlot, first: int, start: int) -> Tensor:
        ctx.slot, ctx.first, ctx.start = slot, first, start
        return slot.read(first, start + current.shape[2])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        past = ctx.start - ctx.first
        ctx.slot.add_gradient(ctx.first, gradient[:, :, :past])
        return gradient[:, :, past:], None, None, None


class Block:
    """Keys and values of one span on the device, after `open`, and where the gradient of the past goes."""

    def __init__(
        self, span: Span, slots: tuple[KVSlot, KVSlot], states: list[Tensor], staged: Staged | None
    ) -> None:
        self.span = span
        self._slots = slots
        self._states = states
        self._staged = staged
        self._stored: list[Any] = []

    def open(self) -> None:
        """Waits until it is on the device."""
        if self._staged is not None:
            self._states = self._staged.wait()

    @property
    def keys_values(self) -> list[Tensor]:
        """Keys and values [B or 1, heads, T, head_dim]."""
        return [tensor[rows(self.span.row)] for tensor in self._states[:2]]

    def add_gradients(self, *gradients: Tensor | None) -> None:
        """Adds what this chunk sends to its past: to the keys, to the values."""
        sums = self._states[2:]
        for index, (slot, gradient) in enumerate(zip(self._slots, gradients, strict=True)):
            if gradient is None:
                continue
            if sums:
                self._stored.append(slot.store_gradient(self.span.k0, sums[index], gradient, self.span.row))
            else:
                slot.add_gradient(self.span.k0, gradient, self.span.row)

    def close(self) -> None:
        """Its memory may be used for another block."""
        if self._staged is not None:
            self._staged.release(*self._stored)


class CarriedPast:
    """What a layer's attention needs beside its current keys and values: the slots, and where the chunk begins.

    It travels on the tensors of current keys and values from the cache to the attention function.
    """

    def __init__(self, layer: Any, carry: Any, start: int, first_visible: int) -> None:
        self.slots: tuple[KVSlot, KVSlot] = layer.slots
        self.carry = carry
        self.start = start
        self._layer = layer
        self._first_visible = first_visible

    @property
    def layer_key(self) -> int:
        """The cache's layer, for the time of a pass."""
        return id(self._layer)

    def taken(self) -> None:
        """The attention function has it: nothing of the past is lost."""
        self._layer.waits_for_attention = False

    def current(self, key: Tensor, value: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What to keep of the current states: nothing where the slots, on the same device, hold them as well."""
        return (None, None) if self.slots[0].transfers is None else (key, value)

    def blocks(
        self, spans: Iterable[Span], current: tuple[Tensor | None, ...], *, with_gradient: bool
    ) -> Iterator[Block]:
        """The keys and values of each span, which holds either past or current keys; the next is on its way.

        `with_gradient`: each block will get what it adds to the gradient of the past. A sum that a block still adds
        to is not brought in with the next one: windows are cut into spans of the same keys for different queries.
        """
        with_gradient = with_gradient and self.slots[0].with_gradient
        ahead: Block | None = None
        for span in chain(spans, [None]):
            block, ahead = ahead, None
            if span is not None and not (with_gradient and block and block.span.shares_keys(span)):
                ahead = self._begin(span, current, with_gradient=with_gradient)
            if block is not None:
                block.open()
                yield block
                block.close()
            if span is not None and ahead is None:
                ahead = self._begin(span, current, with_gradient=with_gradient)

    def _begin(self, span: Span, current: tuple[Tensor | None, ...], *, with_gradient: bool) -> Block:
        transfers = self.slots[0].transfers
        if transfers is None:
            return Block(span, self.slots, [slot.read(span.k0, span.k1) for slot in self.slots], None)
        if span.k0 >= self.start:
            own = slice(span.k0 - self.start, span.k1 - self.start)
            return Block(
                span, self.slots, [states[:, :, own] for states in current if states is not None], None
            )
        requests = [slot.stage(span.k0, span.k1, with_gradient=with_gradient) for slot in self.slots]
        blocks = [blocks[i] for i in range(len(requests[0][0])) for blocks, _ in requests]
        staged = transfers.stage(blocks, [event for _, events in requests for event in events])
        return Block(span, self.slots, [], staged)

    def whole(self, key: Tensor, value: Tensor, first: int | None) -> tuple[Tensor, Tensor]:
        """Past and current keys and values as one view each, from `first` on (None: from the first visible)."""
        begin = self._first_visible if first is None else first
        keys, values = (
            ReadPast.apply(current, slot, begin, self.start)
            for current, slot in zip((key, value), self.slots, strict=True)
        )
        return keys, values


def rows(row: int | None) -> slice:
    """The index of one row that keeps its dimension, or of all."""
    return slice(None) if row is None else slice(row, row + 1)
