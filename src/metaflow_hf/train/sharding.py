"""One model in several processes: a copy in each whose gradients are averaged (DDP), or a part in each (FSDP2)."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from metaflow_hf.data.batches import IGNORE_INDEX, Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Replicas:
    """Where this process stands among the ``size`` of a worker, whose process group is begun."""

    rank: int
    size: int
    parallel: Literal["ddp", "fsdp"]
    device: torch.device

    def wrap(self, model: nn.Module) -> Any:
        """The model as its passes go through it, moved to this process's device; with ``fsdp`` its parameters are
        replaced by their parts, and no more than a layer is whole on the device at once.
        """
        if self.parallel == "ddp":
            ids = [self.device.index or 0] if self.device.type == "cuda" else None
            return nn.parallel.DistributedDataParallel(
                model.to(self.device), device_ids=ids, gradient_as_bucket_view=True
            )
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.size,))
        for layer in _layers(model):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model

    def share(self, batch: Batch) -> tuple[Batch, int]:
        """The rows of a batch that are this process's, and how many of their labels count.

        A process without rows of its own takes one of another's, which counts for nothing: all must do the same passes.
        """
        mine = _rows(batch, slice(self.rank, None, self.size))
        if len(mine.input_ids) and mine.num_tokens:
            return mine, mine.num_tokens
        counted = (batch.labels[:, 1:] != IGNORE_INDEX).sum(dim=1)
        fullest = int(counted.argmax())
        return _rows(batch, slice(fullest, fullest + 1)), 0

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes."""
        dist.all_reduce(value)
        return value

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Adds up the gradients of all processes, which each has for its own rows; one that none has stays missing, so
        that its parameter does not move.
        """
        from metaflow_hf.rollout.replicas import add_up_gradients

        add_up_gradients(parameters)

    @contextmanager
    def syncing(self, model: Any, *, is_last: bool) -> Iterator[None]:
        """Gradients are exchanged in the last pass of a step only."""
        if self.parallel == "fsdp":
            model.set_requires_gradient_sync(is_last)
            yield
        elif is_last:
            yield
        else:
            with model.no_sync():
                yield


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which each process holds a part; all of them have to ask."""
    parts: Any = tensor
    return parts.full_tensor() if is_part(tensor) else tensor


def is_part(tensor: Tensor) -> bool:
    """Whether this process holds a part of the tensor (a DTensor, whose module is not loaded for the question)."""
    return hasattr(tensor, "full_tensor")


def fill(target: Tensor, value: Tensor) -> None:
    """Copies a whole tensor into one of which this process may hold a part."""
    if is_part(target):
        parts: Any = target
        parts.to_local().copy_(part_like(target, value).to_local())
    else:
        target.copy_(value)


def part_like(target: Tensor, value: Tensor) -> Any:
    """The part of this process of a whole tensor that every process has, laid out as ``target``."""
    if not is_part(target):
        return value.to(target.device)
    from torch.distributed.tensor import distribute_tensor

    parts: Any = target
    return distribute_tensor(value.to(target.device), parts.device_mesh, parts.placements, src_data_rank=None)


def _layers(model: nn.Module) -> Sequence[nn.Module]:
    """The decoder's layers: the list of modules that holds most parameters; experts within one may be more in number."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=lambda items: sum(p.numel() for p in items.parameters()), default=[]))


def _rows(batch: Batch, rows: slice) -> Batch:
    positions = batch.position_ids
    return replace(
        batch,
        input_ids=batch.input_ids[rows],
        labels=batch.labels[rows],
        attention_mask=batch.attention_mask[rows],
        position_ids=positions if positions is None else positions[rows],
    )
