"""Attention by blocks in the place of a model's own, for the time of a pass.

It enters transformers as an attention implementation and a mask function of its own name. The mask is what a
chunk sees, in spans; the keys that a layer's cache hands back carry where the past lies; blocks.py does the
rest. Where a layer asks for what no kernel here computes (attention dropout, position biases, a mask of its
own), the implementation that the model was loaded with runs instead, on all keys and with its mask, and a log
line says so. A layer whose past does not arrive here is an error: nothing is left out silently.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from metaflow_hf.errors import UnsupportedModelError
from metaflow_hf.rollout.blocks import BlockAttention, Task
from metaflow_hf.rollout.carry import KVCarry
from metaflow_hf.rollout.kernels import kernel_for
from metaflow_hf.rollout.slots import CarriedPast
from metaflow_hf.rollout.visibility import Visible

_log = logging.getLogger("metaflow_hf.rollout")

NAME = "metaflow_hf_blocks"
_IMPLEMENTATION = "_attn_implementation"

# What models hand to their attention function: soft cap and sinks (s_aux) are computed, the others change nothing in its
# result, for the mask says it all.
_KNOWN = frozenset({"softcap", "s_aux", "sliding_window", "position_ids", "use_cache", "cache_position"})


@contextmanager
def attention_by_blocks(model: nn.Module, carry: KVCarry) -> Iterator[None]:
    """Inside, every attention layer of `model` that goes through transformers' interface reads `carry` by blocks."""
    configurations: list[Any] = list(
        {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    )
    before = [getattr(configuration, _IMPLEMENTATION, None) for configuration in configurations]
    carry.own_attention = getattr(model.config, _IMPLEMENTATION, None) or "eager"
    carry.attention_by_blocks = True
    try:
        for configuration in configurations:
            setattr(configuration, _IMPLEMENTATION, NAME)
        yield
    finally:
        carry.attention_by_blocks = False
        for configuration, implementation in zip(configurations, before, strict=True):
            setattr(configuration, _IMPLEMENTATION, implementation)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention interface of transformers: query [B, N, C, D], key and value [B, K, C, D] -> [B, C, N, D]."""
    past = _past_of(module, key, value)
    if torch.is_autocast_enabled(query.device.type):
        query = query.to(key.dtype)
    if reason := _why_not(query, key, value, attention_mask, dropout, kwargs):
        _log_once(f"{type(module).__name__}: attention as transformers computes it, with its mask ({reason})")
        return _own_attention(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    kernel, name = kernel_for(query, key, value, kwargs.get("softcap"))
    _log_once(f"{type(module).__name__}: attention by blocks, no mask; kernel: {name}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    stash = past.carry.attended if torch.is_grad_enabled() else None
    place = (
        id(module),
        past.layer_key,
    )  # one module may stand for several cache layers, and layers may share one
    known = stash.pop(place, None) if stash is not None else None
    task = Task(past, attention_mask.spans, kernel, scale, known)
    out, lse = BlockAttention.apply(query, key, value, kwargs.get("s_aux"), task)
    if stash is not None and known is None:
        stash[place] = (out.detach(), lse)
    return out, None


def _past_of(module: nn.Module, key: Tensor, value: Tensor) -> CarriedPast:
    past = getattr(key, "carried_past", None)
    if isinstance(past, CarriedPast) and getattr(value, "carried_past", None) == past:
        past.taken()
        return past
    raise UnsupportedModelError(
        f"{type(module).__name__} attends to keys that are not those of its cache, as they were handed over"
    )


def _why_not(
    query: Tensor, key: Tensor, value: Tensor, mask: Any, dropout: float, kwargs: dict[str, Any]
) -> str | None:
    """Why blocks cannot give what the layer asks for, if they cannot."""
    if dropout:
        return "attention dropout"
    if not isinstance(mask, Visible):
        return "a mask of its own"
    if isinstance(mask.spans, str):
        return mask.spans
    sinks = kwargs.get("s_aux")
    if sinks is not None and sinks.shape != query.shape[1:2]:
        return f"sinks {tuple(sinks.shape)} for {query.shape[1]} heads"
    unknown = sorted(k for k, v in kwargs.items() if k not in _KNOWN and v is not None and v is not False)
    if unknown and not (unknown == ["is_causal"] and kwargs["is_causal"] is True):
        return f"it takes {', '.join(unknown)}"
    if not query.dtype == key.dtype == value.dtype:
        return f"queries, keys and values of types {query.dtype}, {key.dtype}, {value.dtype}"
    return None


def _own_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """The implementation that the model was loaded with, on all keys."""
    past: CarriedPast = key.carried_past  # type: ignore[attr-defined]
    name, first = past.carry.own_attention, None
    if isinstance(mask, Visible):
        first, mask = mask.first_key, mask.dense(ALL_MASK_ATTENTION_FUNCTIONS[name])
    keys, values = past.whole(key, value, first)
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    function: Callable[..., Any] | None = eager if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
    if function is None:
        raise UnsupportedModelError(f"{type(module).__name__} has no eager attention function")
    out: Tensor = function(module, query, keys, values, mask, **kwargs)[0]
    return out, None


@functools.cache
def _log_once(message: str) -> None:
    _log.info(message)


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, lambda **arguments: Visible(arguments))
