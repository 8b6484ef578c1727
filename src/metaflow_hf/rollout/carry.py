"""The keys and values of a whole sequence, and their gradient, behind transformers' cache interface.

One `KVCarry` holds two preallocated tensors [B, heads, S, head_dim] per layer (keys, values) and, for exact
gradients, two more of the same shape. A model reads it as an ordinary `transformers.Cache`: for the token
chunk [start, stop) each attention layer hands over its current keys and gets back the past and the current
ones as one view of the buffer, so the past is never copied or concatenated.

With `attention_by_blocks` the layer hands back the current keys alone, which lead the attention function
to the slots (attention.py); every other user reads all through one view.

The gradient crosses token chunks in the backward passes of both (slots.py, blocks.py). Chunks are
differentiated last to first. What a chunk sends to its past is added to the gradient buffer; what later
chunks sent to its own keys is read from there and added to its own. No token of the past is a leaf, and no
graph outlives its chunk. Layers with states instead of keys (`states.py`), or with both, cross borders by those.

It gives up rewinding, beam search and growth: a carry belongs to one sequence of known length.
"""

from __future__ import annotations

import weakref
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
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from metaflow_hf.errors import UnsupportedModelError
from metaflow_hf.rollout.host_memory import HostTransfers
from metaflow_hf.rollout.slots import CarriedPast, HandedOn, KVSlot, ReadPast
from metaflow_hf.rollout.states import SMALLEST_CHUNK, BorderStates


class _CarryLayer(CacheLayerMixin):
    """Full attention: every token of the past is visible.

    The position is set for each token chunk and `update` does not move it: a checkpointed layer may run
    twice and reads the same tokens both times.
    """

    is_sliding = False

    def __init__(self, carry: KVCarry) -> None:
        super().__init__()
        # Without a cycle, so that gigabytes go with the last user and do not wait for the garbage collector.
        self._carry: Any = weakref.proxy(carry)
        self.slots = tuple(KVSlot(carry.num_tokens, carry.transfers, carry.with_gradient) for _ in range(2))
        self.used = False
        self.waits_for_attention = False
        self._written_in = 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.used = True
        # A checkpointed layer that runs again, or another layer that shares this one, has written already.
        writing = self._carry.writing and self._written_in != self._carry.turn
        self._written_in = self._carry.turn
        first, start = self._first_visible(), self._carry.start
        current = [
            HandedOn.apply(
                _as_attended(states) if self._carry.attention_by_blocks else states, slot, start, writing
            )
            for states, slot in zip((key_states, value_states), self.slots, strict=True)
        ]
        if self._carry.attention_by_blocks:
            past = CarriedPast(self, self._carry, start, first)
            for states in current:  # on which the attention function finds the past
                states.carried_past = past
            self.waits_for_attention = True
            return current[0], current[1]
        keys, values = (
            ReadPast.apply(states, slot, first, start)
            for states, slot in zip(current, self.slots, strict=True)
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


class _HybridCarryLayer(_CarryLayer, BorderStates):
    """Full attention and states in one layer."""

    def __init__(self, carry: KVCarry, number_of_states: int) -> None:
        _CarryLayer.__init__(self, carry)
        BorderStates.__init__(self, number_of_states, carry.home, with_gradient=carry.with_gradient)


class _HybridSlidingCarryLayer(_SlidingCarryLayer, BorderStates):
    """Sliding attention and states in one layer."""

    def __init__(self, carry: KVCarry, window: int, number_of_states: int) -> None:
        _SlidingCarryLayer.__init__(self, carry, window)
        BorderStates.__init__(self, number_of_states, carry.home, with_gradient=carry.with_gradient)


class KVCarry(Cache):
    """The cache of one sequence of `num_tokens` tokens, read token chunk by token chunk.

    `transfers`: the buffers lie in host memory (None: on the model's device). `with_gradient`: exact gradients
    across token chunks.
    """

    def __init__(
        self, config: Any, num_tokens: int, transfers: HostTransfers | None, *, with_gradient: bool
    ) -> None:
        self.num_tokens = num_tokens
        self.transfers = transfers
        self.home = None if transfers is None else torch.device("cpu")
        self.with_gradient = with_gradient
        self.start = 0
        self.writing = True
        self.turn = 0  # counts forward calls
        self.attention_by_blocks = False
        self.own_attention = ""  # the attention implementation that blocks stand in for
        self.attended: dict[tuple[int, int], tuple[Tensor, Tensor]] | None = None
        super().__init__(layers=[self._layer(kind) for kind in cache_layers(config)])

    def seek(self, start: int, *, writing: bool) -> None:
        """The next forward call holds the tokens from `start` on; `writing` stores their keys and values."""
        self.start = start
        self.writing = writing
        self.turn += 1
        if self.attended is not None:
            self.attended.clear()
        for layer in self._state_layers():
            layer.begin(start)

    def require_attended(self) -> None:
        """Raises UnsupportedModelError if a layer's past, handed over, did not arrive in its attention."""
        lost = [i for i, layer in enumerate(self.layers) if getattr(layer, "waits_for_attention", False)]
        if lost:
            raise UnsupportedModelError(
                f"layers {lost} do not hand their keys to transformers' attention interface unchanged"
            )

    def backward(self, output: Tensor, gradient: Tensor | None) -> None:
        """Backpropagates from the output of the token chunk that ran last, and what later ones sent to its states.

        `gradient` of the output; None if it has none.
        """
        layers = self._state_layers()
        roots, gradients = ([], []) if gradient is None else ([output], [gradient])
        for layer in layers:
            more_roots, more_gradients = layer.roots()
            roots += more_roots
            gradients += more_gradients
        if roots:
            torch.autograd.backward(roots, gradients)
        for layer in layers:
            layer.collect()

    @property
    def is_linear(self) -> list[bool]:
        """Layers with states and no keys: masks are made for the others."""
        return [
            isinstance(layer, BorderStates) and not isinstance(layer, _CarryLayer) for layer in self.layers
        ]

    @property
    def smallest_chunk(self) -> int:
        """The fewest tokens that a token chunk can have, unless it is the whole sequence."""
        return SMALLEST_CHUNK if self._state_layers() else 1

    def nbytes(self) -> int:
        """Bytes of keys, values, states and, where kept, their gradient."""
        return self.token_bytes() + self.border_bytes()

    def token_bytes(self) -> int:
        """Bytes of what grows with every token: keys, values and, where kept, their gradient."""
        return sum(slot.nbytes() for layer in self._carry_layers() for slot in layer.slots)

    def border_bytes(self) -> int:
        """Bytes of what grows with every token chunk: states and one border's gradient."""
        return sum(layer.nbytes() for layer in self._state_layers())

    def unused_layers(self) -> list[int]:
        """Layers that should carry something but were never written."""
        return [
            i
            for i, layer in enumerate(self.layers)
            if (isinstance(layer, _CarryLayer) and not layer.used)
            or (isinstance(layer, BorderStates) and not layer.was_written)
        ]

    def ignored_layers(self) -> list[int]:
        """Layers with states that do not go on from them, after a backward pass with exact gradients."""
        return [i for i, layer in enumerate(self.layers) if getattr(layer, "was_ignored", False)]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before the current token chunk, for layers of all kinds."""
        del layer_idx
        return self.start

    def _carry_layers(self) -> list[_CarryLayer]:
        return [layer for layer in self.layers if isinstance(layer, _CarryLayer)]

    def _state_layers(self) -> list[BorderStates]:
        return [layer for layer in self.layers if isinstance(layer, BorderStates)]

    def _layer(self, kind: Any) -> Any:
        if type(kind) is LinearAttentionLayer:
            return BorderStates(kind.number_of_states, self.home, with_gradient=self.with_gradient)
        if type(kind) is LinearAttentionAndFullAttentionLayer:
            return _HybridCarryLayer(self, kind.number_of_states)
        if type(kind) is LinearAttentionAndSlidingWindowAttentionLayer:
            return _HybridSlidingCarryLayer(self, kind.sliding_window, kind.number_of_states)
        if type(kind) is DynamicLayer:
            return _CarryLayer(self)
        if type(kind) is DynamicSlidingWindowLayer:
            return _SlidingCarryLayer(self, kind.sliding_window)
        return DummyLayer()


def _as_attended(states: Tensor) -> Tensor:
    """In the type that autocast gives to attention, so that the past is stored once and never cast again."""
    kind = states.device.type
    return states.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else states


def cache_layers(config: Any) -> list[Any]:
    """The cache layers that transformers itself would use for this configuration, all of them of a kind that a carry can hold.

    Raises UnsupportedModelError, naming the kind, for others, such as indexed or compressed attention.
    """
    name = getattr(config, "model_type", type(config).__name__)
    try:
        layers = DynamicCache(config=config).layers
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UnsupportedModelError(
            f"{name}: transformers makes no cache from its configuration ({type(error).__name__}: {error}). "
            "Train it with plain backpropagation (use_chunked_training: false)."
        ) from error
    foreign = sorted({type(layer).__name__ for layer in layers if type(layer) not in _SUPPORTED})
    if foreign:
        raise UnsupportedModelError(
            f"{name}: its cache keeps {', '.join(foreign)}, "
            "which the chunked rollout does not carry across token chunks (attention, full or sliding, and the "
            "states of linear attention, Mamba and convolutions only). "
            "Train it with plain backpropagation (use_chunked_training: false)."
        )
    return layers


_SUPPORTED = (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    DummyLayer,
)
