"""Loss and gradients of a linear head in one go: the logits of one block of tokens exist at a time.

The gradient of the weight is added to its `.grad` block by block, so that no second tensor of its size
[vocabulary, hidden] exists, as torch's `linear_cross_entropy` and autograd need for a moment (Liger-Kernel,
Hsu et al. 2024, and Cut Cross-Entropy, Wijmans et al. 2024, fuse the loss with the head for the same reason).
It needs to know beforehand what the sum of the losses is multiplied by.

Shapes: N counted targets, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_SUMS = frozenset({torch.float32, torch.float64})


def adds_its_gradients(head: nn.Module, kind: torch.dtype) -> bool:
    """Whether `head_and_loss_backward` can take this linear head, computing in `kind`.

    Not where a `.grad` is narrower than fp32, which is too coarse to sum many blocks in; not for fp16, whose products
    overflow before they are scaled; not with hooks on a parameter, which want the gradient of a whole token chunk.
    """
    if kind not in _SUMS and kind != torch.bfloat16:
        return False
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    types = {_gradient_type(parameter) for parameter in trained}
    hooks = ("_backward_hooks", "_post_accumulate_grad_hooks")
    hooked = any(getattr(parameter, name) for parameter in trained for name in hooks)
    return not hooked and types <= ({kind} if kind in _SUMS else _SUMS)


@torch.no_grad()
def head_and_loss_backward(
    head: Any, rows: Tensor, labels: Tensor, scale: Tensor, block: int
) -> tuple[Tensor, Tensor]:
    """Sum of the losses, a scalar, and the gradient of (scale × that sum) with respect to `rows` [N, H].

    The same for the head's weight [V, H] and bias [V] is added to their `.grad` (where they take one). `labels`
    [N], none ignored. `block`: tokens whose logits exist at a time. Softmax and sums are in at least fp32.
    """
    weight, bias = head.weight.to(rows.dtype), head.bias
    bias = None if bias is None else bias.to(rows.dtype)
    wide = torch.promote_types(rows.dtype, torch.float32)
    sums, gradients = [], []
    for row, label in zip(rows.split(block), labels[:, None].split(block), strict=True):
        logits = torch.nn.functional.linear(row, weight, bias).to(wide)
        largest, own = logits.amax(dim=1, keepdim=True), logits.gather(1, label)
        exponentials = logits.sub_(largest).exp_()
        total = exponentials.sum(dim=1, keepdim=True)
        sums.append((total.log() + largest - own).sum())
        # softmax - one-hot, times `total`; what multiplies a whole row is left for the smaller factor
        difference = exponentials.scatter_add_(1, label, -total).to(rows.dtype)
        factor = scale.to(wide) / total
        gradients.append((difference @ weight).mul_(factor))
        _add_product(head.weight, difference, (row * factor).to(rows.dtype))
        if bias is not None and head.bias.requires_grad:
            _gradient(head.bias).add_((difference * factor).sum(dim=0))
    if not sums:
        return rows.new_zeros((), dtype=wide), rows
    return torch.stack(sums).sum(), torch.cat(gradients)


def _add_product(weight: nn.Parameter, difference: Tensor, row: Tensor) -> None:
    """Adds differenceᵀ · row, [V, H], to the weight's gradient, in slices where it has to be cast."""
    if not weight.requires_grad:
        return
    gradient = _gradient(weight)
    if gradient.dtype == row.dtype:
        gradient.addmm_(difference.T, row)
        return
    size = max(difference.numel() // row.shape[1], 1)  # a slice is no larger than the block's logits
    for part, column in zip(gradient.split(size), difference.split(size, dim=1), strict=True):
        part.add_(column.T @ row)


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter, dtype=_gradient_type(parameter))
    return parameter.grad


def _gradient_type(parameter: nn.Parameter) -> torch.dtype:
    """The type that autograd would add in."""
    if parameter.grad is not None:
        return parameter.grad.dtype
    return parameter.grad_dtype or parameter.dtype  # None: any type will do
