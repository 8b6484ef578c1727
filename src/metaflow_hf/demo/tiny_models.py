"""Untrained models of real architectures, small enough to make on the fly: config and safetensors weights.

Weights follow the standard initialisation of their architectures: normal(0, 0.02) for matrices and
embeddings, ones for norms, zeros for biases and for the embedding of the padding token. They are made with numpy alone,
the same on every machine.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Shapes = dict[str, tuple[int, ...]]
Weights = dict[str, npt.NDArray[np.float32]]
INIT_STD = 0.02


def initial_weights(shapes: Shapes, seed: int, *, padding: Mapping[str, int] | None = None) -> Weights:
    """Freshly initialised float32 weights. ``padding`` maps an embedding to the row that is zero."""
    random = np.random.default_rng(seed)
    weights: Weights = {}
    for name, shape in sorted(shapes.items()):
        if name.endswith("bias"):
            weights[name] = np.zeros(shape, np.float32)
        elif len(shape) == 1:
            weights[name] = np.ones(shape, np.float32)
        else:
            weights[name] = (random.standard_normal(shape) * INIT_STD).astype(np.float32)
    for name, row in (padding or {}).items():
        weights[name][row] = 0.0
    return weights


def safetensors_file(weights: Weights) -> bytes:
    from safetensors.numpy import save

    data: bytes = save(weights, metadata={"format": "pt"})
    return data


def sharded_files(weights: Weights, num_shards: int) -> dict[str, bytes]:
    """The weights as ``model-0000i-of-0000n.safetensors`` and their index."""
    names = sorted(weights)
    shard_of = {name: 1 + i * num_shards // len(names) for i, name in enumerate(names)}
    file_of = {n: f"model-{shard_of[n]:05d}-of-{num_shards:05d}.safetensors" for n in names}
    files = {
        file: safetensors_file({n: weights[n] for n in names if file_of[n] == file})
        for file in sorted(set(file_of.values()))
    }
    index = {"metadata": {"total_size": sum(w.nbytes for w in weights.values())}, "weight_map": file_of}
    return {**files, "model.safetensors.index.json": config_file(index)}


def config_file(config: Mapping[str, Any]) -> bytes:
    return (json.dumps(config, indent=2) + "\n").encode()


def llama_config(
    *,
    vocab_size: int,
    hidden_size: int = 128,
    intermediate_size: int = 384,
    num_layers: int = 4,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    max_positions: int = 2048,
) -> dict[str, Any]:
    """A Llama with tied embeddings, for the tokens of `metaflow_hf.demo.tiny_tokenizers.byte_level_bpe`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": hidden_size // num_heads,
        "hidden_act": "silu",
        "max_position_embeddings": max_positions,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "initializer_range": INIT_STD,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "use_cache": True,
        "dtype": "float32",
    }


def llama_weights(config: Mapping[str, Any], seed: int) -> Weights:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    embedding = "model.embed_tokens.weight"
    shapes: Shapes = {embedding: (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            f"{layer}.self_attn.q_proj.weight": (hidden, hidden),
            f"{layer}.self_attn.k_proj.weight": (kv, hidden),
            f"{layer}.self_attn.v_proj.weight": (kv, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, hidden),
            f"{layer}.mlp.gate_proj.weight": (inner, hidden),
            f"{layer}.mlp.up_proj.weight": (inner, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, inner),
        }
    return initial_weights(shapes, seed, padding={embedding: config["pad_token_id"]})
