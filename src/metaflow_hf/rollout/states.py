"""Recurrent and convolution states across token chunks: Mamba, linear attention, short convolutions.

What such a layer knows of its past is a few tensors of fixed size, so the carry keeps them at every border between
token chunks, without a graph. A chunk begins from leaves that hold the states of its first border; the gradient that
reaches them is what the chunk before it gets for the states that it ended with.

Reading never changes a state: whatever a chunk computes for its end is kept apart from what it began with, so a
checkpointed layer that runs twice reads the same states both times.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import LinearAttentionCacheLayerMixin

SMALLEST_CHUNK = 2
"""Tokens: for a single one after others transformers updates recurrent states in place, without a graph."""

_Key = tuple[str, int]


class BorderStates(LinearAttentionCacheLayerMixin):
    """The convolution and recurrent states of one layer at the borders of the token chunks.

    `home` is where the borders lie (None: beside the model's own states). `begin` before each chunk; the states that
    models read are those of its first token, until the next `begin`. `was_written`: some state was kept; `was_ignored`:
    some state that a chunk began with had no part in its loss.
    """

    is_compileable = False

    def __init__(self, number_of_states: int, home: torch.device | None, *, with_gradient: bool) -> None:
        super().__init__(number_of_states)
        # Models take the general path then, instead of one that changes the convolution's state in place.
        self.record_past = True
        self._home = home
        self._with_gradient = with_gradient
        self._borders: dict[int, dict[_Key, Tensor]] = {0: {}}
        self._starts: dict[_Key, Tensor] = {}
        self._ends: dict[_Key, Tensor] = {}
        self._gradients: dict[_Key, Tensor] = {}
        self.states_device: torch.device | None = None
        self.was_written = False
        self.was_ignored = False

    def begin(self, start: int) -> None:
        """The next forward call holds the tokens from `start` on."""
        if start not in self._borders:
            self._borders[start] = {key: self._kept(end) for key, end in self._ends.items()}
        self._ends = {}
        self._starts = {key: self._leaf(state) for key, state in self._borders[start].items()}
        for index in range(self.number_of_states):
            self.has_previous_state[index] = start > 0
            self.conv_states[index] = self._starts.get(("conv", index))
            self.recurrent_states[index] = self._starts.get(("recurrent", index))

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **_: Any
    ) -> Tensor:
        """The inputs of the convolution [B, channels, C] with those before them that it still sees."""
        kernel = self.conv_kernel_size[state_idx] or conv_kernel_size or conv_states.shape[-1]
        self.conv_kernel_size[state_idx] = kernel
        past = self.conv_states[state_idx]
        seen = conv_states if past is None else torch.cat([past, conv_states], dim=-1)
        end = seen[..., -kernel:]
        self._finish(("conv", state_idx), functional.pad(end, (kernel - end.shape[-1], 0)))
        return seen

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **_: Any) -> Tensor:
        """The state after the last token of the chunk, unchanged."""
        self._finish(("recurrent", state_idx), recurrent_states)
        return recurrent_states

    def lazy_initialization(self, *_: Any, **__: Any) -> None:
        """Nothing to do: states are kept as they come."""

    def roots(self) -> tuple[list[Tensor], list[Tensor]]:
        """What the chunk ended with and is differentiated in, and the gradients that later chunks sent for it."""
        keys = [key for key in self._gradients if key in self._ends and self._ends[key].requires_grad]
        return [self._ends[key] for key in keys], [self._gradients[key] for key in keys]

    def collect(self) -> None:
        """After the backward pass of a chunk: its first border's gradient is for the chunk before."""
        self.was_ignored |= any(leaf.requires_grad and leaf.grad is None for leaf in self._starts.values())
        self._gradients = {key: leaf.grad for key, leaf in self._starts.items() if leaf.grad is not None}
        self._ends = {key: end.detach() for key, end in self._ends.items()}

    def nbytes(self) -> int:
        """Bytes of the states at all borders and of one border's gradient, where kept."""
        at_borders = [sum(state.nbytes for state in states.values()) for states in self._borders.values()]
        return sum(at_borders) + (max(at_borders) if self._with_gradient else 0)

    def _finish(self, key: _Key, state: Tensor) -> None:
        self.was_written = True
        self.states_device = state.device
        # A checkpointed layer runs again during the backward pass; what it ended with is known already.
        self._ends.setdefault(key, state)

    def _kept(self, state: Tensor) -> Tensor:
        return state.detach().to(self._home or state.device)

    def _leaf(self, state: Tensor) -> Tensor:
        return state.to(self.states_device or state.device).detach().requires_grad_(self._with_gradient)
