"""The passes over the token chunks of one sequence: forward without graph, then backward chunk by chunk.

exact       chunk 0 → 1 → … → N fills the carry without a graph; then N → … → 1 → 0, each chunk runs again
            with a graph that its own backward frees; gradients reach the past through the carry
truncated   0 → 1 → … → N, each chunk with a graph at once; the past is a constant
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from metaflow_hf.rollout.attention import attention_by_blocks
from metaflow_hf.rollout.carry import KVCarry
from metaflow_hf.rollout.causal_lm import CausalLM
from metaflow_hf.rollout.host_memory import HostTransfers
from metaflow_hf.rollout.loss import LossFunction, cross_entropy_sum, head_loss_backward, head_loss_sum
from metaflow_hf.rollout.rng import RngState, rng_kept
from metaflow_hf.rollout.sequence import TokenSequence, token_chunks
from metaflow_hf.rollout.settings import (
    Precision,
    layers_checkpointed,
    own_checkpointing_off,
    wants_checkpointing,
)


@dataclass(frozen=True)
class Plan:
    """How to roll out: everything that the caller chose and that holds for all token chunks."""

    chunk_size: int
    exact: bool
    use_cpu_offload: bool
    gradient_checkpointing: bool
    ce_loss_fn: LossFunction | None
    attention_by_blocks: bool


class ChunkPasses:
    """One sequence on its way through the model. Sums of losses; the caller divides.

    Either `losses` and later `backward`, or `losses_and_backward`; each once.
    """

    used_segments = 1

    def __init__(self, lm: CausalLM, sequence: TokenSequence, plan: Plan, *, linear_head: bool) -> None:
        self._lm = lm
        self._sequence = sequence
        self._plan = plan
        self._linear_head = linear_head
        self._precision = Precision(lm.device)
        self._checkpointed = (
            plan.gradient_checkpointing or plan.use_cpu_offload or wants_checkpointing(lm.model)
        )
        transfers = HostTransfers(lm.device) if plan.use_cpu_offload else None
        self._carry = KVCarry(lm.config, sequence.num_tokens, transfers, with_gradient=plan.exact)
        if plan.attention_by_blocks and self._checkpointed:
            self._carry.attended = {}
        self._rng: dict[int, RngState] = {}
        self.chunks = token_chunks(sequence.num_tokens, max(plan.chunk_size, self._carry.smallest_chunk))

    @property
    def num_chunks(self) -> int:
        """How many token chunks the sequence is cut into."""
        return len(self.chunks)

    def carry_bytes(self) -> int:
        """Bytes of the keys and values of all tokens and, for exact gradients, of their gradient."""
        return self._carry.nbytes()

    def token_bytes(self) -> int:
        """The part of them that grows with every token."""
        return self._carry.token_bytes()

    def border_bytes(self) -> int:
        """The part of them that grows with every token chunk: recurrent states."""
        return self._carry.border_bytes()

    def losses(self) -> Tensor:
        """Sum of the losses, without a graph; the carry is filled."""
        with self._running(), torch.no_grad():
            return torch.stack([self._loss(chunk, writing=True) for chunk in self.chunks]).sum()

    def backward(self, scale: Tensor) -> None:
        """Adds the gradients of (scale × sum of losses) to every `.grad`, after `losses`."""
        with self._running(), rng_kept(self._lm.device):
            for chunk in reversed(self.chunks):
                self._backward_chunk(chunk, scale, replay=True)

    def losses_and_backward(self, scale: Tensor) -> Tensor:
        """Both at once; the first pass then needs neither the head nor the last token chunk."""
        with self._running():
            if not self._plan.exact:
                return torch.stack([self._backward_chunk(c, scale, replay=False) for c in self.chunks]).sum()
            *earlier, last = self.chunks
            with torch.no_grad():
                for chunk in earlier:
                    self._lm.fill(self._inputs(chunk, writing=True), self._carry)
                    self._carry.require_attended()
            sums = [self._backward_chunk(last, scale, replay=False)]
            with rng_kept(self._lm.device):
                sums += [self._backward_chunk(chunk, scale, replay=True) for chunk in reversed(earlier)]
            return torch.stack(sums).sum()

    def _backward_chunk(self, chunk: tuple[int, int], scale: Tensor, *, replay: bool) -> Tensor:
        if replay:
            self._rng[chunk[0]].restore()
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            if self._checkpointed:
                stack.enter_context(layers_checkpointed(self._lm.model))
            states = self._states(chunk, writing=not replay)
            # The head's backward pass ends, and frees the logits, before that of the layers begins: a gradient
            # of a weight shared with the embeddings is then added at once and not held until the end.
            leaf = states.detach().requires_grad_(states.requires_grad)
            loss, gradient = self._loss_backward(leaf, chunk, scale)
            self._carry.backward(states, gradient)
        return loss

    def _loss_backward(
        self, leaf: Tensor, chunk: tuple[int, int], scale: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The sum of the losses and the gradient of (scale × it); what the head gets of it is added to its `.grad`."""
        if self._linear_head:
            return head_loss_backward(
                self._lm.head,
                leaf,
                self._targets(chunk),
                self._sequence.ignore_index,
                self._plan.ce_loss_fn,
                scale,
            )
        loss = self._loss_of(leaf, chunk)
        if loss.requires_grad:
            loss.backward(scale.to(loss))
        return loss.detach(), leaf.grad

    def _loss(self, chunk: tuple[int, int], *, writing: bool) -> Tensor:
        return self._loss_of(self._states(chunk, writing=writing), chunk)

    def _states(self, chunk: tuple[int, int], *, writing: bool) -> Tensor:
        """What the loss is computed from: the last hidden states where the head is linear, else the logits."""
        inputs = self._inputs(chunk, writing=writing)
        states = (self._lm.hidden if self._linear_head else self._lm.logits)(inputs, self._carry)
        self._carry.require_attended()
        return states

    def _loss_of(self, states: Tensor, chunk: tuple[int, int]) -> Tensor:
        targets = self._targets(chunk)
        ignore_index, ce_loss_fn = self._sequence.ignore_index, self._plan.ce_loss_fn
        if self._linear_head:
            return head_loss_sum(self._lm.head, states, targets, ignore_index, ce_loss_fn)
        return cross_entropy_sum(states, targets, ignore_index, ce_loss_fn)

    def _targets(self, chunk: tuple[int, int]) -> Tensor:
        return self._sequence.targets[:, slice(*chunk)]

    def unused_layers(self) -> list[int]:
        """Layers that should have kept states in the carry and did not."""
        return self._carry.unused_layers()

    def ignored_layers(self) -> list[int]:
        """Layers that keep states and do not go on from them."""
        return self._carry.ignored_layers()

    def _inputs(self, chunk: tuple[int, int], *, writing: bool) -> dict[str, Tensor]:
        self._carry.seek(chunk[0], writing=writing)
        if writing:
            self._rng[chunk[0]] = RngState.capture(self._lm.device)
        return self._sequence.model_inputs(*chunk)

    @contextmanager
    def _running(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(own_checkpointing_off(self._lm.model))
            stack.enter_context(self._precision.entered())
            if self._plan.attention_by_blocks:
                stack.enter_context(attention_by_blocks(self._lm.model, self._carry))
            yield
