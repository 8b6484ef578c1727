"""Attention of one token chunk to its whole past without a [chunk, past] mask, exact in both directions.

What a chunk sees is cut into spans (visibility.py). Each span is one call of a flash kernel that also gives
the log-sum-exp; results over disjoint keys are merged by it. Keys and values are read where they lie, heads
that share them are not repeated, and the gradient that the past gets is added to the carry block by block.
Beside the carry, memory does not grow with the past.

References: Milakov and Gimelshein 2018 (online softmax); Dao et al. 2022 (FlashAttention); Liu et al. 2023
(Ring Attention) for merging by log-sum-exp forwards and reusing the merged one backwards.

Shapes as in kernels.py: query [B, N, C, D], current keys and values [B, K, C, D].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from metaflow_hf.rollout.kernels import Kernel
from metaflow_hf.rollout.slots import CarriedPast, rows
from metaflow_hf.rollout.visibility import Shape, Span

_BLOCK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Task:
    """One layer's attention in one token chunk; `known`: (out, lse) where they were computed before."""

    past: CarriedPast
    spans: list[Span]
    kernel: Kernel
    scale: float
    known: tuple[Tensor, Tensor] | None = None

    def spans_of_blocks(self) -> Iterator[Span]:
        """The spans, cut so that none holds both past and current keys, nor more than 64 MiB of keys.

        Triangles are left whole: they are no longer than the chunk.
        """
        size = max(_BLOCK_BYTES // self.past.slots[0].bytes_per_token(), 1)
        for span in self.spans:
            parts = [span] if span.shape is Shape.CAUSAL else span.split(self.past.start)
            for part in parts:
                step = size if part.shape is Shape.FULL else part.k1 - part.k0
                for k0 in range(part.k0, part.k1, step):
                    yield replace(part, k0=k0, k1=min(k0 + step, part.k1))

    def queries(self, span: Span) -> tuple[slice, slice, slice]:
        """The index of the span's queries in a tensor [B, N, C, …] of this chunk."""
        return rows(span.row), slice(None), slice(span.q0 - self.past.start, span.q1 - self.past.start)


class BlockAttention(torch.autograd.Function):
    """query, current keys, current values -> (out [B, C, N, D], lse [B, N, C]), given the past in the slots.

    `sinks` [N] or None: one more logit a head, whose value is zero (attention sinks, gpt-oss).
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, task: Task
    ) -> tuple[Tensor, Tensor]:
        current = task.past.current(key, value)
        with _types_as_they_are(query):
            out, lse = task.known or _with_sinks(*_forward(query, current, task), sinks)
        ctx.task = replace(task, known=None)  # it is the output itself here, and the output leads back to ctx
        ctx.save_for_backward(query, *current, out, lse, sinks)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None, None]:
        with _types_as_they_are(gradients[0]):
            query, key, value, out, lse, sinks = ctx.saved_tensors  # once: checkpointing gives them once
            of_states = _backward(ctx, gradients[0], (query, key, value, out, lse))
            of_sinks = _sinks_backward(gradients[0], out, lse, sinks) if ctx.needs_input_grad[3] else None
            return (*of_states, of_sinks, None)


def _types_as_they_are(tensor: Tensor) -> torch.autocast:
    """Autocast off: queries, keys and values come in its type already, and sums are kept wider."""
    return torch.autocast(tensor.device.type, enabled=False)


def _backward(ctx: Any, gradient: Tensor, saved: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value, out, lse = saved
    task: Task = ctx.task
    past = task.past
    grad, out = gradient.transpose(1, 2), out.transpose(1, 2)
    d_query = torch.zeros_like(query, dtype=lse.dtype)
    d_key, d_value = (slot.zeros(query.shape[2], lse) for slot in past.slots)
    for block in past.blocks(task.spans_of_blocks(), (key, value), with_gradient=True):
        span, at = block.span, task.queries(block.span)
        parts = [tensor[at] for tensor in (grad, query, out, lse)]
        keys, values = block.keys_values
        dq, dk, dv = _span_backward(span, parts, keys, values, task)
        d_query[at] += dq
        if span.k0 < past.start:
            needed = ctx.needs_input_grad[1:3]
            block.add_gradients(dk if needed[0] else None, dv if needed[1] else None)
        else:
            own = (rows(span.row), slice(None), slice(span.k0 - past.start, span.k1 - past.start))
            d_key[own] += dk
            d_value[own] += dv
    return d_query.to(query.dtype), d_key.to(query.dtype), d_value.to(query.dtype)


def _with_sinks(out: Tensor, lse: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Merged with the sink of each head: a key of logit `sinks` and value zero that every query sees."""
    if sinks is None:
        return out, lse
    sink = sinks.to(lse.dtype)[:, None]
    kept = torch.sigmoid(lse - sink).transpose(1, 2)[..., None]
    return (out * kept).to(out.dtype), torch.logaddexp(lse, sink)


def _sinks_backward(gradient: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Its value being zero, all that a sink does is to take weight from what is seen."""
    weight = (sinks.to(lse.dtype)[:, None] - lse).exp()
    taken = (gradient.to(lse.dtype) * out).sum(dim=-1).transpose(1, 2)
    return -(weight * taken).sum(dim=(0, 2)).to(sinks.dtype)


def _forward(query: Tensor, current: tuple[Tensor | None, ...], task: Task) -> tuple[Tensor, Tensor]:
    """A query that sees nothing gets zeros, as torch's scaled_dot_product_attention gives it."""
    batch, heads, length, _ = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    out = query.new_zeros(batch, length, heads, task.past.slots[1].width(), dtype=wide)
    lse = query.new_full((batch, heads, length), -torch.inf, dtype=wide)
    for block in task.past.blocks(task.spans_of_blocks(), current, with_gradient=False):
        at = task.queries(block.span)
        keys, values = block.keys_values
        more, more_lse = _span_forward(block.span, query[at], keys, values, task)
        so_far, so_far_lse = out.transpose(1, 2)[at], lse[at]
        so_far.lerp_(more.to(wide), torch.sigmoid(more_lse - so_far_lse)[..., None])
        so_far_lse.copy_(torch.logaddexp(so_far_lse, more_lse.to(wide)))
    return out.to(query.dtype), lse


def _span_forward(span: Span, q: Tensor, k: Tensor, v: Tensor, task: Task) -> tuple[Tensor, Tensor]:
    if span.shape is not Shape.FADING:
        return task.kernel.forward(q, k, v, task.scale, span.shape is Shape.CAUSAL)
    # read backwards, the triangle that a window cuts off is the causal one
    out, lse = task.kernel.forward(q.flip(2), k.flip(2), v.flip(2), task.scale, True)
    return out.flip(2), lse.flip(2)


def _span_backward(
    span: Span, parts: list[Tensor], k: Tensor, v: Tensor, task: Task
) -> tuple[Tensor, Tensor, Tensor]:
    grad, q, out, lse = parts
    if span.shape is not Shape.FADING:
        return task.kernel.backward(grad, q, k, v, out, lse, task.scale, span.shape is Shape.CAUSAL)
    grad, q, out, lse, k, v = (t.flip(2) for t in (grad, q, out, lse, k, v))
    dq, dk, dv = task.kernel.backward(grad, q, k, v, out, lse, task.scale, True)
    return dq.flip(2), dk.flip(2), dv.flip(2)
