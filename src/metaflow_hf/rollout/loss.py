"""Cross entropy of one token chunk as a sum over counted targets; the division is the rollout's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

LossFunction = Callable[[Tensor, Tensor], Tensor]

_BLOCK_BYTES = 32 * 2**20


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


def head_loss_sum(
    head: nn.Module, hidden: Tensor, targets: Tensor, ignore_index: int, ce_loss_fn: LossFunction | None
) -> Tensor:
    """`cross_entropy_sum(head(hidden), …)` with the logits of one block of tokens in memory at a time.

    hidden [B, C, H], targets [B, C]. Ignored positions are left out before the head, which is most of a
    sequence whose prompt is not trained on. A block's logits (at most 32 MiB) are computed again for its
    backward pass, unless one block is all there is.
    """
    counted = targets != ignore_index
    rows, labels = hidden[counted], targets[counted]
    if not len(labels):
        return hidden[:, :0].sum()
    num_blocks = -(-len(labels) * _vocabulary(head) * 4 // _BLOCK_BYTES)

    def block_loss(hidden_block: Tensor, label_block: Tensor) -> Tensor:
        return cross_entropy_sum(head(hidden_block), label_block, ignore_index, ce_loss_fn)

    if num_blocks <= 1:
        return block_loss(rows, labels)
    blocks = zip(rows.chunk(num_blocks), labels.chunk(num_blocks), strict=True)
    if not torch.is_grad_enabled():
        return torch.stack([block_loss(*block) for block in blocks]).sum()
    return torch.stack([checkpoint(block_loss, *block, use_reentrant=False) for block in blocks]).sum()


def _vocabulary(head: nn.Module) -> int:
    weight: Any = head.weight
    return int(weight.shape[0])
