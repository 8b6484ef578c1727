"""What else trains on long sequences: the rivals of tests/bench/rollout.py, one step each.

    full       plain backpropagation
    gc         gradient checkpointing of every layer (Chen et al. 2016), as transformers has it
    gc_loss    the same, and the logits of one block of tokens at a time
    alst       the same, and the MLP in tiles of tokens (Arctic Long Sequence Training, Snowflake 2025;
               one tile per hidden-size tokens, as it does)
    seco       Sequential Chunk-wise Optimization (2025): key/value cache of a forward pass without graph, then
               chunk by chunk in reverse, each with its own graph and the gradient of its past's cache

All give the gradients of the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LOGITS_BYTES = 32 * 2**20


def full(model: Any, ids: Tensor, chunk_size: int) -> Tensor:
    return _whole_logits_loss(model, ids)


def gc(model: Any, ids: Tensor, chunk_size: int) -> Tensor:
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    return _whole_logits_loss(model, ids)


def gc_loss(model: Any, ids: Tensor, chunk_size: int) -> Tensor:
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    loss = _blocked_loss(model, ids)
    loss.backward()
    return loss.detach()


def alst(model: Any, ids: Tensor, chunk_size: int) -> Tensor:
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.model.layers:
        if not isinstance(layer.mlp.forward, _TiledMLP):
            layer.mlp.forward = _TiledMLP(layer.mlp.forward)
    loss = _blocked_loss(model, ids)
    loss.backward()
    return loss.detach()


def seco(model: Any, ids: Tensor, chunk_size: int) -> Tensor:
    from transformers import DynamicCache

    cuts = [(a, min(a + chunk_size, ids.shape[1])) for a in range(0, ids.shape[1], chunk_size)]
    targets = _targets(ids)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for a, b in cuts:
            model.model(input_ids=ids[:, a:b], past_key_values=cache, use_cache=True)
    kept = [(layer.keys, layer.values) for layer in cache.layers]
    gradients = [tuple(torch.zeros_like(states) for states in pair) for pair in kept]
    total = torch.zeros(())
    for a, b in reversed(cuts):
        past = [tuple(states[:, :, :a].detach().requires_grad_() for states in pair) for pair in kept]
        cache = DynamicCache(past, config=model.config) if a else DynamicCache(config=model.config)
        logits = model(input_ids=ids[:, a:b], past_key_values=cache, use_cache=True).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets[:, a:b].flatten(), reduction="sum")
        loss = loss / (ids.shape[1] - 1)
        own = [(layer.keys, layer.values) for layer in cache.layers]
        later = [tuple(g[:, :, a:b] for g in pair) for pair in gradients]
        ends = [states[:, :, a:b] for pair in own for states in pair]
        torch.autograd.backward([loss, *ends], [None, *(g for pair in later for g in pair)])
        for pair, sums in zip(past if a else [], gradients, strict=bool(a)):
            for states, sum_ in zip(pair, sums, strict=True):
                sum_[:, :, :a] += states.grad
        total += loss.detach()
    return total


RIVALS: dict[str, Callable[[Any, Tensor, int], Tensor]] = {
    "full": full,
    "gc": gc,
    "gc_loss": gc_loss,
    "alst": alst,
    "seco": seco,
}


def _targets(ids: Tensor) -> Tensor:
    return F.pad(ids[:, 1:], (0, 1), value=-100)


def _whole_logits_loss(model: Any, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits
    loss = F.cross_entropy(logits.flatten(0, 1), _targets(ids).flatten())
    loss.backward()
    return loss.detach()


def _blocked_loss(model: Any, ids: Tensor) -> Tensor:
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    size = max(LOGITS_BYTES // (model.config.vocab_size * 4), 1)

    def block_loss(states: Tensor, targets: Tensor) -> Tensor:
        logits = model.lm_head(states).float()
        return F.cross_entropy(logits, targets, reduction="sum")

    blocks = zip(hidden.flatten(0, 1).split(size), _targets(ids).flatten().split(size), strict=True)
    sums = [checkpoint(block_loss, *block, use_reentrant=False) for block in blocks]
    return torch.stack(sums).sum() / (ids.shape[1] - 1)


class _TiledMLP:
    """An MLP of one layer, tile of tokens by tile, each computed again for its backward pass."""

    def __init__(self, forward: Callable[[Tensor], Tensor]) -> None:
        self._forward = forward

    def __call__(self, hidden: Tensor) -> Tensor:
        tiles = hidden.chunk(math.ceil(hidden.shape[1] / hidden.shape[2]), dim=1)
        return torch.cat([checkpoint(self._forward, tile, use_reentrant=False) for tile in tiles], dim=1)
