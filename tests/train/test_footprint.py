"""How much memory a worker will need: counted on models without values."""

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, Mamba2Config, Qwen3NextConfig, RwkvConfig

from metaflow_hf.config import TrainConfig
from metaflow_hf.train.footprint import memory_of_worker

LENGTH, CHUNK, ROWS = 128, 32, 3
SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
LINEAR = {
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32}


@pytest.mark.parametrize(
    ("architecture", "per_token", "per_chunk"),
    [
        # Keys and values of two heads of eight in two layers, and their gradients.
        (LlamaConfig(**SMALL, **HEADS), 2 * 2 * 2 * 8 * 4 * 2, 0),
        (
            GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=LENGTH),
            2 * 2 * 32 * 4 * 2,
            0,
        ),
        # One of four layers is attention; the others leave states at the borders.
        (
            Qwen3NextConfig(**{**SMALL, "num_hidden_layers": 4}, **HEADS, **LINEAR, head_dim=8),
            2 * 2 * 8 * 4 * 2,
            ...,
        ),
        # States alone.
        (Mamba2Config(**SMALL, num_heads=8, head_dim=8, state_size=8, n_groups=1), 0, ...),
        # No cache that could be carried along: trained whole.
        (RwkvConfig(**SMALL), 0, 0),
    ],
    ids=lambda value: value.model_type if hasattr(value, "model_type") else None,
)
def test_the_carry_is_that_of_the_layers_that_have_one(tmp_path, architecture, per_token, per_chunk):
    architecture.save_pretrained(tmp_path)
    config = TrainConfig.parse(
        {
            "model": {"repo_id": "acme/mine", "initialise": "random"},
            "data": {"sequence_length": LENGTH, "batch_size": ROWS},
            "rollout": {"chunk_size": CHUNK},
        }
    )
    carry = memory_of_worker(tmp_path, config, torch.float32)["carry"]
    states = carry / ROWS - LENGTH * per_token
    if per_chunk is ...:
        assert states > 0
        assert states % (LENGTH // CHUNK) == 0
    else:
        assert states == per_chunk
