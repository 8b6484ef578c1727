"""Tiny untrained models of further architectures, under the weight names that transformers expects."""

from collections.abc import Mapping
from typing import Any

from metaflow_hf.demo.tiny_models import INIT_STD, Shapes, Weights, initial_weights


def gpt2_config(*, vocab_size: int, hidden_size: int = 64, num_layers: int = 2) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": vocab_size,
        "n_embd": hidden_size,
        "n_layer": num_layers,
        "n_head": 4,
        "n_positions": 1024,
        "initializer_range": INIT_STD,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "dtype": "float32",
    }


def gpt2_weights(config: Mapping[str, Any], seed: int) -> Weights:
    hidden = config["n_embd"]
    shapes: Shapes = {
        "wte.weight": (config["vocab_size"], hidden),
        "wpe.weight": (config["n_positions"], hidden),
        **_norm("ln_f", hidden),
    }
    for i in range(config["n_layer"]):
        layer = f"h.{i}"
        shapes |= _norm(f"{layer}.ln_1", hidden) | _norm(f"{layer}.ln_2", hidden)
        for name, inputs, outputs in (  # Conv1D: [in, out]
            ("attn.c_attn", hidden, 3 * hidden),
            ("attn.c_proj", hidden, hidden),
            ("mlp.c_fc", hidden, 4 * hidden),
            ("mlp.c_proj", 4 * hidden, hidden),
        ):
            shapes |= {f"{layer}.{name}.weight": (inputs, outputs), f"{layer}.{name}.bias": (outputs,)}
    return initial_weights(shapes, seed)


def bert_config(*, vocab_size: int, hidden_size: int = 96, num_layers: int = 2) -> dict[str, Any]:
    return {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 4 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
        "initializer_range": INIT_STD,
        "pad_token_id": 0,
        "dtype": "float32",
    }


def bert_weights(config: Mapping[str, Any], seed: int) -> Weights:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    embedding = "embeddings.word_embeddings.weight"
    shapes: Shapes = {
        embedding: (config["vocab_size"], hidden),
        "embeddings.position_embeddings.weight": (config["max_position_embeddings"], hidden),
        "embeddings.token_type_embeddings.weight": (config["type_vocab_size"], hidden),
        **_norm("embeddings.LayerNorm", hidden),
        **_linear("pooler.dense", hidden, hidden),
    }
    for i in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        for name in ("query", "key", "value"):
            shapes |= _linear(f"{layer}.attention.self.{name}", hidden, hidden)
        shapes |= _linear(f"{layer}.attention.output.dense", hidden, hidden)
        shapes |= _norm(f"{layer}.attention.output.LayerNorm", hidden)
        shapes |= _linear(f"{layer}.intermediate.dense", hidden, inner)
        shapes |= _linear(f"{layer}.output.dense", inner, hidden)
        shapes |= _norm(f"{layer}.output.LayerNorm", hidden)
    return initial_weights(shapes, seed, padding={embedding: config["pad_token_id"]})


def distilbert_config(*, vocab_size: int, hidden_size: int = 64, num_layers: int = 2) -> dict[str, Any]:
    return {
        "architectures": ["DistilBertModel"],
        "model_type": "distilbert",
        "vocab_size": vocab_size,
        "dim": hidden_size,
        "hidden_dim": 4 * hidden_size,
        "n_layers": num_layers,
        "n_heads": 4,
        "max_position_embeddings": 512,
        "activation": "gelu",
        "initializer_range": INIT_STD,
        "pad_token_id": 0,
        "dtype": "float32",
    }


def distilbert_weights(config: Mapping[str, Any], seed: int) -> Weights:
    hidden, inner = config["dim"], config["hidden_dim"]
    embedding = "embeddings.word_embeddings.weight"
    shapes: Shapes = {
        embedding: (config["vocab_size"], hidden),
        "embeddings.position_embeddings.weight": (config["max_position_embeddings"], hidden),
        **_norm("embeddings.LayerNorm", hidden),
    }
    for i in range(config["n_layers"]):
        layer = f"transformer.layer.{i}"
        for name in ("q_lin", "k_lin", "v_lin", "out_lin"):
            shapes |= _linear(f"{layer}.attention.{name}", hidden, hidden)
        shapes |= _norm(f"{layer}.sa_layer_norm", hidden) | _norm(f"{layer}.output_layer_norm", hidden)
        shapes |= _linear(f"{layer}.ffn.lin1", hidden, inner) | _linear(f"{layer}.ffn.lin2", inner, hidden)
    return initial_weights(shapes, seed, padding={embedding: config["pad_token_id"]})


def opt_config(*, vocab_size: int, hidden_size: int = 64, num_layers: int = 2) -> dict[str, Any]:
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "word_embed_proj_dim": hidden_size,
        "ffn_dim": 4 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "do_layer_norm_before": True,
        "init_std": INIT_STD,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "dtype": "float32",
    }


def opt_weights(config: Mapping[str, Any], seed: int) -> Weights:
    hidden, inner = config["hidden_size"], config["ffn_dim"]
    embedding = "model.decoder.embed_tokens.weight"
    shapes: Shapes = {
        embedding: (config["vocab_size"], hidden),
        "model.decoder.embed_positions.weight": (
            config["max_position_embeddings"] + 2,
            hidden,
        ),  # OPT's offset
        **_norm("model.decoder.final_layer_norm", hidden),
    }
    for i in range(config["num_hidden_layers"]):
        layer = f"model.decoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{layer}.self_attn.{name}", hidden, hidden)
        shapes |= _norm(f"{layer}.self_attn_layer_norm", hidden) | _norm(f"{layer}.final_layer_norm", hidden)
        shapes |= _linear(f"{layer}.fc1", hidden, inner) | _linear(f"{layer}.fc2", inner, hidden)
    return initial_weights(shapes, seed, padding={embedding: config["pad_token_id"]})


def phi_config(*, vocab_size: int, hidden_size: int = 64, num_layers: int = 2) -> dict[str, Any]:
    return {
        "architectures": ["PhiForCausalLM"],
        "model_type": "phi",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 4 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "initializer_range": INIT_STD,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }


def phi_weights(config: Mapping[str, Any], seed: int) -> Weights:
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    shapes: Shapes = {
        "model.embed_tokens.weight": (vocab, hidden),
        **_norm("model.final_layernorm", hidden),
        **_linear("lm_head", hidden, vocab),
    }
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "dense"):
            shapes |= _linear(f"{layer}.self_attn.{name}", hidden, hidden)
        shapes |= _norm(f"{layer}.input_layernorm", hidden)
        shapes |= _linear(f"{layer}.mlp.fc1", hidden, inner) | _linear(f"{layer}.mlp.fc2", inner, hidden)
    return initial_weights(shapes, seed)


def gpt_bigcode_config(*, vocab_size: int, hidden_size: int = 64, num_layers: int = 2) -> dict[str, Any]:
    return {**gpt2_config(vocab_size=vocab_size, hidden_size=hidden_size, num_layers=num_layers)} | {
        "architectures": ["GPTBigCodeForCausalLM"],
        "model_type": "gpt_bigcode",
        "multi_query": True,
    }


def gpt_bigcode_weights(config: Mapping[str, Any], seed: int) -> Weights:
    hidden = config["n_embd"]
    keys_and_values = 2 * hidden // config["n_head"]
    shapes: Shapes = {
        "transformer.wte.weight": (config["vocab_size"], hidden),
        "transformer.wpe.weight": (config["n_positions"], hidden),
        **_norm("transformer.ln_f", hidden),
    }
    for i in range(config["n_layer"]):
        layer = f"transformer.h.{i}"
        shapes |= _norm(f"{layer}.ln_1", hidden) | _norm(f"{layer}.ln_2", hidden)
        shapes |= _linear(f"{layer}.attn.c_attn", hidden, hidden + keys_and_values)
        shapes |= _linear(f"{layer}.attn.c_proj", hidden, hidden)
        shapes |= _linear(f"{layer}.mlp.c_fc", hidden, 4 * hidden)
        shapes |= _linear(f"{layer}.mlp.c_proj", 4 * hidden, hidden)
    return initial_weights(shapes, seed)


def _linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name: str, size: int) -> Shapes:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}
