"""Gradients of a DDP-wrapped model: the mean over ranks, as DDP itself would leave them.

The rollout runs the module inside the wrapper, whose reducer therefore sees no forward pass and stays out of
the way; the reduction happens here, once, after the last token chunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

_BUCKET_BYTES = 25 * 2**20


def average_gradients(model: nn.Module) -> None:
    """Every `.grad` becomes its mean over the ranks; nothing happens without DDP or inside `no_sync()`.

    All ranks must call it. A gradient that some ranks lack counts as zero there; one that all lack stays None.
    """
    if not isinstance(model, DistributedDataParallel) or not model.require_backward_grad_sync:
        return
    group = model.process_group
    add_up_gradients(model.module.parameters(), group=group, divisor=dist.get_world_size(group))


def add_up_gradients(
    parameters: Iterable[nn.Parameter], *, group: dist.ProcessGroup | None = None, divisor: int = 1
) -> None:
    """Every `.grad` becomes its sum over the ranks, divided by `divisor`.

    All ranks must call it. A gradient that some ranks lack counts as zero there; one that all lack stays None.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    for bucket in _buckets(_gradients_held_anywhere(trained, group)):
        # A large one is added up where it lies.
        alone = len(bucket) == 1 and bucket[0].is_contiguous()
        flat = bucket[0].view(-1) if alone else torch.cat([gradient.flatten() for gradient in bucket])
        if divisor != 1:
            flat /= divisor
        dist.all_reduce(flat, group=group)
        if alone:
            continue
        for gradient, whole in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(whole.view_as(gradient))


def _gradients_held_anywhere(parameters: list[nn.Parameter], group: dist.ProcessGroup | None) -> list[Tensor]:
    if not parameters:
        return []
    held = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8)
    held = held.to(parameters[0].device)
    dist.all_reduce(held, op=dist.ReduceOp.MAX, group=group)
    gradients = []
    for parameter, is_held in zip(parameters, held.tolist(), strict=True):
        if is_held and parameter.grad is None:
            # In the type in which the ranks that have one add it up: all have to reduce alike.
            parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
        if parameter.grad is not None:
            gradients.append(parameter.grad)
    return gradients


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one type and device, up to 25 MiB together; the same on every rank."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        kind = (gradient.dtype, gradient.device)
        full = sum(g.nbytes for g in bucket) + gradient.nbytes > _BUCKET_BYTES
        if bucket and (full or kind != (bucket[0].dtype, bucket[0].device)):
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket
