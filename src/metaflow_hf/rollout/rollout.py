"""`chunked_segment_rollout`: loss and gradients of sequences whose activations do not fit as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metaflow_hf.rollout.causal_lm import CausalLM, refuse_blind_predictions, unwrap
from metaflow_hf.rollout.host_memory import can_offload
from metaflow_hf.rollout.loss import LossFunction
from metaflow_hf.rollout.packing import documents_apart, without_mask
from metaflow_hf.rollout.parts import PartPasses
from metaflow_hf.rollout.passes import ChunkPasses, Plan
from metaflow_hf.rollout.probe import refuse_masks, require
from metaflow_hf.rollout.replicas import average_gradients
from metaflow_hf.rollout.segments import SegmentPasses, has_recurrent_carry
from metaflow_hf.rollout.sequence import TokenSequence, shifted_targets, with_labels
from metaflow_hf.rollout.settings import Unchanged, hooks_at_the_end


def chunked_segment_rollout(
    model: nn.Module,
    batch: Mapping[str, Any],
    max_segments: int = 1,
    chunk_size: int = 2048,
    *,
    gradient: Literal["exact", "truncated"] = "exact",
    use_cpu_offload: bool = False,
    gradient_checkpointing: bool = False,
    ce_loss_fn: LossFunction | None = None,
    num_items_in_batch: float | Tensor | None = None,
    ignore_index: int = -100,
    backward: bool = False,
) -> tuple[Tensor, dict[str, float]]:
    """Loss and gradients equal those of one ordinary pass over the whole sequence ("exact").

    Memory: keys and values of all tokens, their gradient, and the activations of one token chunk. Time: one
    more forward pass than plain backpropagation. "truncated" leaves out gradients across chunk borders, which
    halves the carry and, with `backward`, saves the second forward pass.

    `batch`: `input_ids` [B, S] and optionally `labels` (default: the input ids, padding ignored),
    `attention_mask` and `position_ids` (default: derived from the mask, so padding on either side is right),
    all [B, S]. Labels are shifted here, over the whole sequence; sums are divided by the number of labels
    that count, or by `num_items_in_batch` (gradient accumulation: the count over all its batches). Positions
    that begin anew within a row mark packed documents: none sees another, mask or not, and short ones are
    rolled out side by side.

    Either `loss.backward()` (any scale, once, before weights or training mode change; else RuntimeError) or `backward=True`, which
    does both in one call, cheaper by one pass of the head, and returns a loss without a graph. Gradients are
    added to every `.grad`, in fp32 for parameters whose `grad_dtype` says so, whatever their own type; under DDP
    they become the mean over ranks. Post-accumulate-gradient hooks of a parameter run once, when its gradient is
    complete. If no label counts, loss and gradients are zero.

    `chunk_size` in tokens. `use_cpu_offload`: the carry lies in host memory (no effect on a CPU); implies
    `gradient_checkpointing`, which keeps one layer's activations of a token chunk instead of all.
    `ce_loss_fn(logits [N, V], targets [N])` gets counted, already shifted targets and returns N losses or
    their sum. `max_segments` is for models with a recurrent carry (`initial_carry(batch)`,
    `forward(carry, batch)` -> (carry, loss summed over counted tokens)); language models ignore it.

    Metrics: `ce` (mean loss of a counted label), `num_chunks`, `used_segments`, `effective_seq_len`,
    `num_tokens` (labels that count), `carry_bytes` (the carry and its gradient).

    Raises UnsupportedModelError for a model or batch whose result would be wrong, with the reason;
    ValueError for arguments that make no sense.
    """
    _check(max_segments, chunk_size, gradient, num_items_in_batch)
    device = next(unwrap(model).parameters()).device
    plan = Plan(
        chunk_size=chunk_size,
        exact=gradient == "exact",
        use_cpu_offload=use_cpu_offload and can_offload(device),
        gradient_checkpointing=gradient_checkpointing,
        ce_loss_fn=ce_loss_fn,
        attention_by_blocks=True,
    )
    passes: PartPasses | SegmentPasses
    if has_recurrent_carry(unwrap(model)):
        passes, num_tokens = _segment_passes(unwrap(model), batch, max_segments, plan, ignore_index, device)
    else:
        passes, num_tokens = _chunk_passes(model, batch, plan, ignore_index)
    divisor = float(num_tokens if num_items_in_batch is None else num_items_in_batch) or 1.0
    loss = _loss(model, passes, divisor, device, backward=backward)
    return loss, {
        "ce": float(loss.detach()) * divisor / max(num_tokens, 1),
        "num_chunks": passes.num_chunks,
        "used_segments": passes.used_segments,
        "effective_seq_len": int(batch["input_ids"].shape[1]),
        "num_tokens": num_tokens,
        "carry_bytes": passes.carry_bytes(),
    }


def _chunk_passes(
    model: nn.Module, batch: Mapping[str, Any], plan: Plan, ignore_index: int
) -> tuple[PartPasses, int]:
    lm = CausalLM(model)
    report = require(model, exact=plan.exact)
    batch_as_given = TokenSequence.from_batch(batch, ignore_index, lm.device)
    if plan.ce_loss_fn is None:
        batch_as_given.refuse_negative_targets()
    sequences = [
        without_mask(part, movable=lm.takes_positions)
        for part in documents_apart(batch_as_given, plan.chunk_size)
    ]
    for sequence in sequences:
        refuse_blind_predictions(lm, sequence)
        refuse_masks(lm.name, report, sequence)
    plan = replace(plan, attention_by_blocks=report.attention_by_blocks)
    parts = [ChunkPasses(lm, sequence, plan, linear_head=report.linear_head) for sequence in sequences]
    return PartPasses(parts, lm.device), batch_as_given.num_targets()


def _segment_passes(
    model: nn.Module,
    batch: Mapping[str, Any],
    max_segments: int,
    plan: Plan,
    ignore_index: int,
    device: torch.device,
) -> tuple[SegmentPasses, int]:
    if plan.ce_loss_fn is not None:
        raise ValueError("ce_loss_fn: a model with a recurrent carry computes its own loss. Leave it out.")
    batch = with_labels(batch, ignore_index, device)
    num_tokens = int((shifted_targets(batch["labels"], ignore_index) != ignore_index).sum())
    passes = SegmentPasses(
        model,
        batch,
        max_segments,
        device,
        offload=plan.use_cpu_offload,
        checkpointed=plan.gradient_checkpointing,
    )
    return passes, num_tokens


def _loss(
    model: nn.Module,
    passes: PartPasses | SegmentPasses,
    divisor: float,
    device: torch.device,
    *,
    backward: bool,
) -> Tensor:
    trainable = any(parameter.requires_grad for parameter in model.parameters())
    if not backward:
        anchor = torch.zeros((), device=device, requires_grad=trainable)
        loss: Tensor = _Rollout.apply(anchor, model, passes, divisor)
        return loss
    if not trainable:
        raise ValueError("backward=True, but no parameter of the model requires a gradient.")
    with hooks_at_the_end(model):
        total = passes.losses_and_backward(torch.tensor(1.0 / divisor, dtype=torch.float64, device=device))
        average_gradients(model)
    return total / divisor


class _Rollout(torch.autograd.Function):
    """The loss; its backward runs the token chunks again in reverse and adds to every `.grad` itself."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, model: nn.Module, passes: PartPasses | SegmentPasses, divisor: float
    ) -> Tensor:
        del anchor
        ctx.model, ctx.passes, ctx.divisor = model, passes, divisor
        losses = passes.losses()
        ctx.unchanged = Unchanged(model)
        return losses / divisor

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None, None]:
        passes, ctx.passes = ctx.passes, None
        if passes is None:
            raise RuntimeError("backward() ran twice on one loss; the first freed its carry. Roll out again.")
        ctx.unchanged.require()
        with hooks_at_the_end(ctx.model):
            passes.backward(gradients[0].double() / ctx.divisor)
            average_gradients(ctx.model)
        return None, None, None, None


def _check(max_segments: int, chunk_size: int, gradient: str, num_items_in_batch: Any) -> None:
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it is a number of tokens, at least 1.")
    if max_segments < 1:
        raise ValueError(f"max_segments is {max_segments}; it must be at least 1.")
    if gradient not in {"exact", "truncated"}:
        raise ValueError(f'gradient is {gradient!r}; it is "exact" or "truncated".')
    if num_items_in_batch is not None and not float(num_items_in_batch) >= 0:
        raise ValueError(f"num_items_in_batch is {num_items_in_batch}; it is a number of labels.")
