"""What a gradient test can ask for: a batch, how the model is changed, how the rollout is called, what is expected."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo.trial import padded_batch

Batch = dict[str, Tensor]
LENGTH = 41


@dataclass
class Case:
    """`batches` are rolled out one after the other; `documents`, each passed whole, are what they are compared with.

    All losses are divided by `count`.
    """

    model: nn.Module
    batches: list[Batch]
    documents: list[Batch]
    count: int
    options: dict[str, Any] = field(default_factory=dict)
    backward: bool = True


def whole(model: nn.Module, ids: Tensor) -> Case:
    batch = {"input_ids": ids, "labels": ids}
    return Case(model, [{"input_ids": ids}], [batch], _count(batch))


def two_calls(model: nn.Module, ids: Tensor) -> Case:
    case = whole(model, ids)
    case.backward = False
    return case


def padded(model: nn.Module, ids: Tensor) -> Case:
    """Row 0 is whole, row 1 padded on the left across more than one token chunk, row 2 on the right."""
    batch = padded_batch(model, ids)
    return Case(model, [batch], [batch], _count(batch))


def ignored(model: nn.Module, ids: Tensor) -> Case:
    """Labels ignored across whole token chunks, and in a whole row."""
    labels = ids.clone()
    labels[:, 5:30] = -100
    labels[1] = -100
    batch = {"input_ids": ids, "labels": labels}
    return Case(model, [batch], [batch], _count(batch))


def packed(model: nn.Module, ids: Tensor) -> Case:
    lengths = ((17, 3, 9, 12), (1, 25, 2, 13), (41,))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    batch = {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions == 0, -100)}
    return Case(model, [batch], list(documents_of(batch)), _count(batch))


def frozen(model: nn.Module, ids: Tensor) -> Case:
    """Embeddings and everything of the first layer take no gradient."""
    for name, parameter in model.named_parameters():
        if "embed" in name or "wte" in name or ".0." in name:
            parameter.requires_grad_(False)
    return whole(model, ids)


def adapted(model: nn.Module, ids: Tensor) -> Case:
    import peft

    linear = {name.split(".")[-1] for name, m in model.named_modules() if type(m) is nn.Linear}
    targets = sorted(linear - {"lm_head", "embed_out", "out_proj", "gate"}) or ["c_attn"]
    config = peft.LoraConfig(
        r=4, target_modules=targets, init_lora_weights=False, fan_in_fan_out=targets == ["c_attn"]
    )
    return whole(peft.get_peft_model(model, config), ids)


def accumulated(model: nn.Module, ids: Tensor) -> Case:
    """Two batches with one common count."""
    labels = ids.clone()
    labels[0, 3:20] = -100
    rows = [{"input_ids": ids[part], "labels": labels[part]} for part in (slice(0, 1), slice(1, 3))]
    return Case(model, rows, [{"input_ids": ids, "labels": labels}], sum(map(_count, rows)))


def checkpointed(model: nn.Module, ids: Tensor) -> Case:
    case = whole(model, ids)
    case.options["gradient_checkpointing"] = True
    return case


def offloaded(model: nn.Module, ids: Tensor) -> Case:
    case = padded(model, ids)
    case.options["use_cpu_offload"] = True
    return case


def own_loss(model: nn.Module, ids: Tensor) -> Case:
    case = whole(model, ids)
    case.options["ce_loss_fn"] = lambda logits, targets: F.cross_entropy(logits, targets, reduction="none")
    return case


CASES: tuple[Callable[[nn.Module, Tensor], Case], ...] = (
    whole,
    two_calls,
    padded,
    ignored,
    packed,
    frozen,
    adapted,
    accumulated,
    checkpointed,
    offloaded,
    own_loss,
)


def documents_of(batch: Batch) -> Iterator[Batch]:
    """Each packed document by itself; those of one token predict nothing and are left out."""
    for ids, labels, positions in zip(
        batch["input_ids"], batch["labels"], batch["position_ids"], strict=True
    ):
        borders = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        for start, stop in itertools.pairwise(borders):
            if stop - start > 1:
                yield {"input_ids": ids[None, start:stop], "labels": labels[None, start:stop]}


def _count(batch: Batch) -> int:
    return int((batch["labels"][:, 1:] != -100).sum())
