"""Cross entropy of one token chunk as a sum over counted targets; the division is the rollout's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import LinearCrossEntropyOptions, functional
from torch.utils.checkpoint import checkpoint

from metaflow_hf.rollout.head import adds_its_gradients, head_and_loss_backward

LossFunction = Callable[[Tensor, Tensor], Tensor]

_BLOCK_BYTES = {"cpu": 16 * 2**20}
_ACCELERATOR_BLOCK_BYTES = 256 * 2**20  # fewer, larger matrix products


def cross_entropy_sum(
    logits: Tensor, targets: Tensor, ignore_index: int, ce_loss_fn: LossFunction | None
) -> Tensor:
    """Sum of the losses of all counted targets, a scalar that always hangs on the graph of the logits.

    logits [B, C, V] or [N, V], targets [B, C] or [N]. `ce_loss_fn(logits [M, V], targets [M])` gets the M
    counted positions only and returns M losses or their sum; the default is cross entropy in at least fp32.
    """
    logits, targets = logits.reshape(-1, logits.shape[-1]), targets.flatten()
    if ce_loss_fn is None:
        wide = logits.float() if logits.dtype in {torch.float16, torch.bfloat16} else logits
        return functional.cross_entropy(wide, targets, ignore_index=ignore_index, reduction="sum")
    counted = targets != ignore_index
    if not counted.any():
        return logits[:0].sum()
    return ce_loss_fn(logits[counted], targets[counted]).sum()


def head_loss_backward(
    head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    ignore_index: int,
    ce_loss_fn: LossFunction | None,
    scale: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """`head_loss_sum` without a graph, and the gradient of (scale × it) with respect to `hidden`.

    That of the head's parameters is added to their `.grad`. `hidden` is a leaf; the gradient is None where it takes
    none.
    """
    kind = _computed_in(hidden)
    if ce_loss_fn is None and _is_plain_linear(head, hidden) and adds_its_gradients(head, kind):
        counted = targets != ignore_index
        rows, block = hidden.detach()[counted].to(kind), _tokens_of_a_block(head, hidden)
        loss, of_rows = head_and_loss_backward(head, rows, targets[counted], scale, block)
        if not hidden.requires_grad:
            return loss, None
        gradient = torch.zeros_like(hidden)
        gradient[counted] = of_rows.to(gradient.dtype)
        return loss, gradient
    loss = head_loss_sum(head, hidden, targets, ignore_index, ce_loss_fn)
    if loss.requires_grad:
        loss.backward(scale.to(loss))
    return loss.detach(), hidden.grad


def head_loss_sum(
    head: nn.Module, hidden: Tensor, targets: Tensor, ignore_index: int, ce_loss_fn: LossFunction | None
) -> Tensor:
    """`cross_entropy_sum(head(hidden), …)` with the logits of one block of tokens in memory at a time.

    hidden [B, C, H], targets [B, C]. Ignored positions are left out before the head, which is most of a
    sequence whose prompt is not trained on. A plain linear head with the default loss goes through torch's
    `linear_cross_entropy`, which finds the gradients along with the loss; other heads and losses compute a
    block's logits (at most 16 MiB, 256 MiB on an accelerator) again for its backward pass.
    """
    counted = targets != ignore_index
    rows, labels = hidden[counted], targets[counted]
    if not len(labels):
        return hidden[:, :0].sum()
    block = _tokens_of_a_block(head, hidden)
    if ce_loss_fn is None and _is_plain_linear(head, hidden):
        return _linear_cross_entropy_sum(head, rows, labels, block)

    def block_loss(hidden_block: Tensor, label_block: Tensor) -> Tensor:
        return cross_entropy_sum(head(hidden_block), label_block, ignore_index, ce_loss_fn)

    if len(labels) <= block:
        return block_loss(rows, labels)
    blocks = zip(rows.split(block), labels.split(block), strict=True)
    if not torch.is_grad_enabled():
        return torch.stack([block_loss(*block) for block in blocks]).sum()
    return torch.stack([checkpoint(block_loss, *block, use_reentrant=False) for block in blocks]).sum()


def logits_block_bytes(device: torch.device) -> int:
    """The most that the logits of one block take."""
    return _BLOCK_BYTES.get(device.type, _ACCELERATOR_BLOCK_BYTES)


def _linear_cross_entropy_sum(head: Any, rows: Tensor, labels: Tensor, block: int) -> Tensor:
    """Softmax and sums in at least fp32 ("accurate"), as the default loss has them."""
    kind, bias = _computed_in(rows), head.bias
    rows, weight, bias = rows.to(kind), head.weight.to(kind), None if bias is None else bias.to(kind)
    policy: Any = "compact" if rows.dtype in {torch.float32, torch.float64} else "accurate"
    options = LinearCrossEntropyOptions(batch_chunk_size=block, chunking_method=None, acc_policy=policy)
    return functional.linear_cross_entropy(
        rows, weight, labels, linear_bias=bias, reduction="sum", options=options
    )


def _is_plain_linear(head: nn.Module, hidden: Tensor) -> bool:
    """Nothing but weight and bias: no adapter, quantisation, parametrisation, hook or forward of its own."""
    if type(head) is not nn.Linear or type(head.weight) is not nn.Parameter or "forward" in vars(head):
        return False
    autocast = torch.is_autocast_enabled(hidden.device.type)
    hooks = (getattr(head, f"_{way}{time}_hooks") for way in ("forward", "backward") for time in ("", "_pre"))
    same_type = autocast or head.weight.dtype == hidden.dtype
    return same_type and head.weight.device == hidden.device and not any(hooks)


def _computed_in(hidden: Tensor) -> torch.dtype:
    """The type that matrix products of these states are computed in, here and now."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _tokens_of_a_block(head: Any, hidden: Tensor) -> int:
    return max(logits_block_bytes(hidden.device) // (int(head.weight.shape[0]) * 4), 1)
