"""The keys and values of a whole sequence, and their gradient, behind transformers' cache interface.

One `KVCarry` holds two preallocated tensors [B, heads, S, head_dim] per layer (keys, values) and, for exact
gradients, two more of the same shape. A model reads it as an ordinary `transformers.Cache`: for the token
chunk [start, stop) each attention layer hands over its current keys and gets back the past and the current
ones as one view of the buffer, so the past is never copied or concatenated.

The gradient crosses token chunks in `_Read.backward`. Chunks are differentiated last to first. What a chunk
sends to its past is added to the gradient buffer; what later chunks sent to its own keys is read from there
and added to its own. No token of the past is a leaf, and no graph outlives its chunk.

It gives up rewinding, beam search and growth: a carry belongs to one sequence of known length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from metaflow_hf.errors import UnsupportedModelError


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

    def add_gradient(self, start: int, gradient: Tensor) -> None:
        """Adds what a later token chunk sends back to tokens [start, start + C)."""
        if not self._with_gradient or not gradient.shape[2]:
            return
        if self.gradient is None:
            assert self.states is not None
            self.gradient = torch.zeros_like(self.states)
        part = self.gradient[:, :, start : start + gradient.shape[2]]
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


class _Read(torch.autograd.Function):
    """current [B, heads, stop - start, head_dim] -> past and current [B, heads, stop - first, head_dim]."""

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


class _CarryLayer(CacheLayerMixin):
    """Full attention: every token of the past is visible.

    The position is set for each token chunk and `update` does not move it: a checkpointed layer may run
    twice and reads the same tokens both times.
    """

    is_sliding = False

    def __init__(self, carry: KVCarry) -> None:
        super().__init__()
        self._carry = carry
        self.slots = tuple(KVSlot(carry.num_tokens, carry.home, carry.with_gradient) for _ in range(2))
        self.used = False

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        first, start = self._first_visible(), self._carry.start
        self.used = True
        keys, values = (
            _Read.apply(states, slot, first, start, self._carry.writing)
            for states, slot in zip((key_states, value_states), self.slots, strict=True)
        )
        return keys, values

    def _first_visible(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        first = self._first_visible()
        return self._carry.start - first + query_length, first

    def get_seq_length(self) -> int:
        return self._carry.start

    def get_max_length(self) -> int:
        return self._carry.num_tokens

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the slots allocate on their first write."""


class _SlidingCarryLayer(_CarryLayer):
    """Sliding or chunked attention: at most `window - 1` tokens of the past are visible.

    The buffer still holds all tokens, because the reverse pass needs each chunk's own window again.
    """

    is_sliding = True

    def __init__(self, carry: KVCarry, window: int) -> None:
        super().__init__(carry)
        self._window = window

    def _first_visible(self) -> int:
        return max(self._carry.start - self._window + 1, 0)


class KVCarry(Cache):
    """The cache of one sequence of `num_tokens` tokens, read token chunk by token chunk.

    `home`: device of the buffers (None: the model's). `with_gradient`: exact gradients across token chunks.
    """

    def __init__(
        self, config: Any, num_tokens: int, home: torch.device | None, *, with_gradient: bool
    ) -> None:
        self.num_tokens = num_tokens
        self.home = home
        self.with_gradient = with_gradient
        self.start = 0
        self.writing = True
        super().__init__(layers=[self._layer(kind) for kind in cache_layers(config)])

    def seek(self, start: int, *, writing: bool) -> None:
        """The next forward call holds the tokens from `start` on; `writing` stores their keys and values."""
        self.start = start
        self.writing = writing

    def nbytes(self) -> int:
        """Bytes of keys, values and, where kept, their gradient."""
        return sum(slot.nbytes() for layer in self._carry_layers() for slot in layer.slots)

    def unused_layers(self) -> list[int]:
        """Layers that should carry something but were never written."""
        return [i for i, layer in enumerate(self.layers) if isinstance(layer, _CarryLayer) and not layer.used]

    def _carry_layers(self) -> list[_CarryLayer]:
        return [layer for layer in self.layers if isinstance(layer, _CarryLayer)]

    def _layer(self, kind: Any) -> Any:
        if type(kind) is DynamicLayer:
            return _CarryLayer(self)
        if type(kind) is DynamicSlidingWindowLayer:
            return _SlidingCarryLayer(self, kind.sliding_window)
        return DummyLayer()


def cache_layers(config: Any) -> list[Any]:
    """The cache layers that transformers itself would use for this configuration, all of them of a kind that a carry can hold.

    Raises UnsupportedModelError, naming the kind, for recurrent, convolutional and indexed states.
    """
    layers = DynamicCache(config=config).layers
    supported = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)
    foreign = sorted({type(layer).__name__ for layer in layers if type(layer) not in supported})
    if foreign:
        raise UnsupportedModelError(
            f"{getattr(config, 'model_type', type(config).__name__)}: its cache keeps {', '.join(foreign)}, "
            "which the chunked rollout does not carry across token chunks (full and sliding attention only). "
            "Train it with plain backpropagation (use_chunked_training: false)."
        )
    return layers
