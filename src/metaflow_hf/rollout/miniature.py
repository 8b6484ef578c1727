"""A small model of the same architecture, with random weights: what the probe is tried on where no weights are.

Widths, experts, vocabulary and windows shrink, and the first layers are kept, as many as show every kind of layer.
Everything that decides how a model computes (kinds of layers, biases, norms, scales, routing, rope) stays. Windows
become shorter than the probe's few tokens, so the probe also sees what a full-sized window would hide from it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

HIDDEN = 32
HEADS = 4
HEAD_DIM = 8
WINDOW = 9
MAX_LAYERS = 12
_VOCABULARY = 64

# What a key means, by the first pattern that matches all of it.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"(.*_)?vocab_size(_per_layer_input)?|n_vocab", _VOCABULARY),
    (
        r"hidden_size|d_model|n_embd|emb_dim|embedding_dim|word_embed_proj_dim|lru_width|embedding_size",
        HIDDEN,
    ),
    (r"mamba_d_ssm|attention_hidden_size", 2 * HIDDEN),
    (r"(input|output)_embedding_size|dim_model_base|ple_embed_dim", HIDDEN),
    (r"qk_head_dim|attention_head_dim|mamba_d_head|mamba_headdim", 2 * HEAD_DIM),
    (r"(.*_)?head_dim|d_head|dim_head|kv_channels|attention_head_size|rotary_dim", HEAD_DIM),
    (r"(.*_)?num_(key_value|kv)_heads|num_query_groups", 2),
    (r"(.*_)?(n|num)(_.*)?_heads?|(.*_)?attention_heads", HEADS),
    (r"(num_experts|moe)_(per_tok(en)?|top_?k|k)|moe_topk", 2),
    (r"(num|n|moe_num)_(routed_|local_)?experts|zero_expert_num", 4),
    (r"topk_group", 1),
    (r"(mamba_)?n_?groups", 2),
    (r"n_group|num_expert_group", 2),
    (
        r"(.*_)?intermediate_(.*_)?size(_.*)?|(.*_)?ffn_(hidden_size|dim)|dim_ff|dff|d_inner|n_inner|feed_forward_size",
        48,
    ),
    (
        r"router_hidden_size|prompt_mid_dim|classifier_proj_size|expert_ffn_hidden_size|shape_embed_dim|pronunciation_embed_dim",
        16,
    ),
    (r"(.*_)?lora_rank|laurel_rank|adapter_rank|hidden_size_per_layer_input|time_step_rank|mamba_dt_rank", 8),
    (r"(.*_)?state_size|(.*_)?d_state|d_rel|hc_lowrank|gated_norm_rank", 8),
    (
        r"sliding_window(_size)?|window_size|attention_window_size|attention_chunk_size|local_attention",
        WINDOW,
    ),
    (r"local_attention_window_len|keep_window_size|index_topk|rel_extent", WINDOW),
    (r"(mamba_)?chunk_size|block_size", 8),
    (r"(n|num|encoder|decoder|num_encoder|num_decoder)(_hidden)?_layers?|num_blocks", 0),
)
_KEPT = frozenset({0, 1, -1})
_DROPPED = frozenset(
    {"model_type", "transformers_version", "architectures", "dtype", "torch_dtype", "id2label", "label2id"}
)


def miniature(config: Any, **changes: Any) -> Any:
    """A configuration of the same class for a model of some ten thousand weights; `changes` have the last word.

    Raises ValueError where the shrunk sizes contradict each other, as configurations of transformers say it.
    """
    values = {key: value for key, value in config.to_dict().items() if key not in _DROPPED}
    total = int(getattr(config, "num_hidden_layers", 0) or 0)
    layers = _num_layers(values, total)
    small = _all_shrunk(values, total, layers)
    try:
        return type(config)(**small | changes)
    except Exception as error:  # configurations raise whatever their validators raise; nothing is swallowed
        raise ValueError(f"{config.model_type}: no small configuration: {error}") from error


def small_model(config: Any) -> nn.Module:
    """A causal language model of the miniature, always with the same random weights, in fp32 and not training.

    Raises ValueError where none can be built.
    """
    text = config.get_text_config(decoder=True)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: nn.Module = AutoModelForCausalLM.from_config(miniature(text), dtype=torch.float32)
    except Exception as error:  # models raise whatever a value makes them raise; nothing is swallowed
        raise ValueError(f"{text.model_type}: no small model: {type(error).__name__}: {error}") from error
    return model.eval()


def _all_shrunk(values: Mapping[str, Any], total: int, layers: int) -> dict[str, Any]:
    small = {
        key: _shrunk(key, value, total, layers) for key, value in values.items() if not key.startswith("_")
    }
    kv, heads = values.get("num_key_value_heads"), values.get("num_attention_heads")
    if kv is not None and kv == heads:
        small["num_key_value_heads"] = small["num_attention_heads"]
    if isinstance(values.get("expand"), int) and "num_heads" in values:
        small["head_dim"] = small["expand"] * small["hidden_size"] // small["num_heads"]
    return small


def _shrunk(key: str, value: Any, total: int, layers: int) -> Any:
    if isinstance(value, dict) and (key.endswith("_config") or key == "per_layer_config"):
        kept = {k: v for k, v in value.items() if not (str(k).isdigit() and int(k) >= layers)}
        return (
            {k: _shrunk(str(k), v, total, layers) for k, v in kept.items() if k not in _DROPPED}
            if not all(str(k).isdigit() for k in kept)
            else {k: _all_shrunk(v, 0, 0) for k, v in kept.items()}
        )
    if isinstance(value, list) and total > 1 and len(value) == total:
        return [_shrunk(key, item, 0, 0) for item in value[:layers]]
    if isinstance(value, bool) or not isinstance(value, int) or value in _KEPT:
        return value
    if key.endswith("_token_id"):
        return min(value, _VOCABULARY - 1)
    size = next((size for pattern, size in _SIZES if re.fullmatch(pattern, key)), value)
    return min(size or layers, value)


def _num_layers(values: Mapping[str, Any], total: int) -> int:
    """The shortest beginning that holds each kind of layer; two at least, so that states cross a layer."""
    longest = 1 + max(1, int(values.get("attn_layer_offset") or 0))
    for value in values.values():
        if not isinstance(value, list) or total < 2 or len(value) != total:
            continue
        kinds = [str(item) for item in value]
        if isinstance(value[0], str) or len(set(kinds)) < total:
            longest = max(longest, *(kinds.index(kind) + 1 for kind in set(kinds)))
    return min(longest, total or longest, MAX_LAYERS)
