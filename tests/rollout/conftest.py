"""Tiny random models in fp64, whose fp32 norms and softmax are raised to fp64 so that 1e-10 means something."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rollout.streams import RaceDetector, TrackedTransfers
from torch import Tensor, nn
from zoo.fp64 import fp64_inside

VOCABULARY = 61

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_DRY: dict[str, Any] = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 9},
    "gpt2": _DRY,
    "gpt_neox": {},
    "phi": _DRY,
    "gemma2": {"head_dim": 8, "sliding_window": 9, "query_pre_attn_scalar": 8},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    "bart": {
        "d_model": 32,
        "decoder_layers": 3,
        "decoder_ffn_dim": 48,
        "decoder_attention_heads": 4,
        "dropout": 0.0,
        "is_encoder_decoder": False,
        "is_decoder": True,
    },
    "bloom": {"hidden_dropout": 0.0, "attention_dropout": 0.0},
    "gpt_neo": {
        "num_hidden_layers": 2,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 9,
        "embed_dropout": 0.0,
        "attention_dropout": 0.0,
        "resid_dropout": 0.0,
    },
    "granite": {"logits_scaling": 4.0, "attention_multiplier": 0.3, "embedding_multiplier": 2.0},
    "olmo2": {},
    "cohere": {"logit_scale": 0.25},
    "stablelm": {},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "gpt_oss": {
        "head_dim": 8,
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 9,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "deepseek_v2": {
        "num_key_value_heads": 4,
        "kv_lora_rank": 8,
        "q_lora_rank": None,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "qwen3_next": {
        "head_dim": 8,
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "lfm2": {
        "num_hidden_layers": 2,
        "layer_types": ["conv", "full_attention"],
        "block_auto_adjust_ff_dim": False,
    },
    "mamba2": {
        "num_hidden_layers": 2,
        "num_heads": 4,
        "head_dim": 16,
        "state_size": 8,
        "n_groups": 2,
        "chunk_size": 8,
    },
    "falcon_h1": {
        "num_hidden_layers": 2,
        "head_dim": 8,
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
    },
    "llama4_text": {
        "head_dim": 8,
        "attention_chunk_size": 9,
        "num_local_experts": 2,
        "intermediate_size_mlp": 48,
        "no_rope_layers": [1, 1, 0],
    },
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def wide() -> Iterator[None]:
    with fp64_inside():
        yield


@pytest.fixture
def offloading(monkeypatch) -> Iterator[RaceDetector]:
    """`use_cpu_offload` moves the carry of a model on the CPU too: in blocks of few tokens, through streams that are
    watched inside of it. Whatever they do without an order between them fails the test.
    """
    detector = RaceDetector()
    monkeypatch.setattr("metaflow_hf.rollout.rollout.can_offload", lambda _device: True)
    monkeypatch.setattr(
        "metaflow_hf.rollout.passes.HostTransfers", lambda device: TrackedTransfers(device, detector)
    )
    monkeypatch.setattr("metaflow_hf.rollout.blocks._BLOCK_BYTES", 1024)
    monkeypatch.setattr(Tensor, "record_stream", lambda *_: None)
    yield detector
    assert not detector.races, detector.races[:5]


@functools.cache
def _config(family: str) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(family, **{**_SHAPE, **FAMILIES[family]})


@pytest.fixture
def make_model() -> Callable[..., Any]:
    """make_model(family, **changes to the configuration): a causal language model in fp64, in training mode."""
    import copy

    from transformers import AutoModelForCausalLM

    def make(family: str = "llama", *, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
        config = copy.deepcopy(_config(family))
        config._experts_implementation = "eager"  # grouped matrix products know no fp64
        for key, value in changes.items():
            setattr(config, key, value)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).to(dtype).train()
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "sinks" in name:
                nn.init.normal_(parameter, std=0.3, mean=0.5)
        return model

    return make


@pytest.fixture
def tokens() -> Callable[..., Tensor]:
    """tokens(batch, length): random ids that are never padding."""

    def make(batch: int = 2, length: int = 41, seed: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, VOCABULARY, (batch, length), generator=generator)

    return make


@pytest.fixture
def full_backprop() -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
    """full_backprop(model, batch): loss and gradients of one ordinary forward and backward pass."""

    def run(model: nn.Module, batch: dict[str, Tensor], divisor: float | None = None) -> tuple[Tensor, Any]:
        model.zero_grad()
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits = model(**inputs).logits
        labels = batch.get("labels", batch["input_ids"])[:, 1:].flatten()
        total = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels, reduction="sum")
        loss = total / (divisor or max(int((labels != -100).sum()), 1))
        loss.backward()
        found = gradients(model)
        model.zero_grad()
        return loss.detach(), found

    return run


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def gradients_of() -> Callable[[nn.Module], dict[str, Tensor]]:
    return gradients


@pytest.fixture
def assert_equal_gradients() -> Callable[..., None]:
    """Every gradient is there, and all together differ by at most `tolerance` relative to their norm."""

    def check(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
        assert set(found) == set(expected)
        scale = max(float(g.norm()) for g in expected.values())
        for name, gradient in expected.items():
            difference = float((found[name] - gradient).norm())
            assert difference <= tolerance * max(float(gradient.norm()), 1e-6 * scale), (name, difference)

    return check
