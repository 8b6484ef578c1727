"""Tiny random models of every causal language model of the installed transformers, and what their defaults lack."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# Defaults of some configurations cannot be built, or are too long to reach what makes the family special.
CHANGES: dict[str, dict[str, Any]] = {
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 8},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "sliding_window": None},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "gemma3n_text": {
        "num_hidden_layers": 5,
        "num_kv_shared_layers": 2,
        "layer_types": [
            "sliding_attention",
            "full_attention",
            "sliding_attention",
            "sliding_attention",
            "full_attention",
        ],
        "intermediate_size": [48] * 5,
        "activation_sparsity_pattern": [0.0] * 5,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_d_head": 16, "mamba_n_heads": 4},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "zamba": {
        "num_hidden_layers": 5,
        "layers_block_type": ["linear_attention", "hybrid"] * 2 + ["linear_attention"],
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots3_note_text": {"head_dim": 16, "num_hidden_layers": 2, "per_layer_config": None},
    "rwkv": {"attention_hidden_size": 32},
    "xlstm": {"num_heads": 2, "qk_dim_factor": 1.0},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8], "max_position_embeddings": 64},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "xmod": {"default_language": "en_XX"},
}


def families() -> list[str]:
    """The model types that transformers has a causal language model for, one of each class of configuration."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    seen: dict[Any, str] = {}
    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        seen.setdefault(CONFIG_MAPPING[family], family)
    return list(seen.values())


def config_of(family: str) -> Any:
    from transformers import AutoConfig

    from metaflow_hf.rollout.miniature import miniature

    config = AutoConfig.for_model(family)
    text = config.get_text_config(decoder=True)
    if text.model_type != config.model_type:
        family, config = text.model_type, text
    small = miniature(config, **CHANGES.get(family, {}))
    for key in vars(small):
        if "jitter" in key or "dropout" in key or "pdrop" in key or key.endswith("_drop"):
            setattr(small, key, 0.0)
    if hasattr(small, "is_decoder"):
        small.is_decoder = True
    return small


def build(family: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    config = config_of(family)
    config._experts_implementation = "eager"  # grouped matrix products know no fp64
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)
