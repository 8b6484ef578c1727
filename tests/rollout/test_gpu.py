"""What only an accelerator shows: its flash kernels, its streams, its memory. Skipped without one."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rollout.cases import LENGTH

from metaflow_hf.rollout import attention, chunked_segment_rollout
from metaflow_hf.rollout.causal_lm import CausalLM
from metaflow_hf.rollout.kernels import FlashCUDA, Tiled, kernel_for
from metaflow_hf.rollout.memory import ChunkSizer, free_device_bytes

MIB = 2**20


@pytest.fixture
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    return torch.device("cuda")


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize(
    "family", ["llama", "mistral", "gemma2", "gpt_oss", "bloom", "deepseek_v2", "qwen3_next", "falcon_h1"]
)
def test_gradients_are_those_of_full_backprop_in_fp64(
    family, offload, gpu, make_model, tokens, full_backprop, gradients_of, assert_equal_gradients
):
    model, batch = make_model(family).to(gpu), {"input_ids": tokens(2, LENGTH).to(gpu)}
    _, expected = full_backprop(model, batch)

    for backward in (True, False):
        model.zero_grad()
        loss, _ = chunked_segment_rollout(
            model, batch, chunk_size=7, use_cpu_offload=offload, backward=backward
        )
        if not backward:
            loss.backward()
        assert_equal_gradients(gradients_of(model), expected)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("head", [64, 96])
def test_bf16_by_the_flash_kernel_is_as_near_to_the_truth_as_one_pass_is(
    head, offload, gpu, make_model, tokens, full_backprop, gradients_of, caplog
):
    caplog.set_level(logging.INFO, "metaflow_hf.rollout")
    attention._log_once.cache_clear()
    sizes = {"hidden_size": 4 * head, "head_dim": head, "num_attention_heads": 4, "num_key_value_heads": 2}
    model, ids = make_model("mistral", sliding_window=300, **sizes).to(gpu), tokens(2, 1500).to(gpu)
    _, truth = full_backprop(model, {"input_ids": ids})
    model.to(torch.bfloat16)
    _, plain = full_backprop(model, {"input_ids": ids})

    chunked_segment_rollout(model, {"input_ids": ids}, chunk_size=256, use_cpu_offload=offload, backward=True)

    assert "attention by blocks, no mask; kernel: flash" in caplog.text
    errors = [
        sum(float((found[name].double() - truth[name]).norm() ** 2) for name in truth) ** 0.5
        for found in (gradients_of(model), plain)
    ]
    assert errors[0] < 1.2 * errors[1]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("head", [64, 128, 256])
def test_the_flash_kernel_agrees_with_plain_products(head, causal, gpu):
    if torch.cuda.get_device_capability(gpu) < (8, 0):
        pytest.skip("FlashAttention-2 needs compute capability 8.0")
    torch.manual_seed(0)
    q, grad = (torch.randn(2, 8, 300, head, device=gpu, dtype=torch.bfloat16) for _ in range(2))
    k, v = (
        torch.randn(2, 2, 300 if causal else 777, head, device=gpu, dtype=torch.bfloat16) for _ in range(2)
    )
    assert isinstance(kernel_for(q, k, v)[0], FlashCUDA)
    scale = head**-0.5
    found, expected = (
        (out, lse, *kernel.backward(grad, q, k, v, out, lse, scale, causal))
        for kernel in (FlashCUDA(), Tiled())
        for out, lse in [kernel.forward(q, k, v, scale, causal)]
    )

    for ours, right in zip(found, expected, strict=True):
        assert float((ours.double() - right.double()).norm() / right.double().norm()) < 1e-2


def test_dropout_is_drawn_again_as_it_was(gpu, make_model, tokens, gradients_of, assert_equal_gradients):
    model = make_model("gpt2", resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3).to(gpu)
    found = []
    for backward in (True, False):
        model.zero_grad()
        torch.manual_seed(5)
        loss, _ = chunked_segment_rollout(
            model, {"input_ids": tokens(2, LENGTH).to(gpu)}, chunk_size=7, backward=backward
        )
        if not backward:
            loss.backward()
        found.append((loss.item(), gradients_of(model)))

    assert found[0][0] == pytest.approx(found[1][0], rel=1e-9)
    assert_equal_gradients(found[0][1], found[1][1])


@pytest.fixture
def peak_bytes(gpu, make_model, tokens):
    """peak_bytes(length, **options): of one step of a bf16 model, above its weights and gradients; and the carry's."""
    sizes = {"hidden_size": 512, "head_dim": 64, "num_attention_heads": 8, "num_key_value_heads": 8}
    model = make_model("llama", max_position_embeddings=2**20, **sizes).to(gpu, torch.bfloat16)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def measure(length: int, **options) -> tuple[int, int]:
        batch = {"input_ids": tokens(1, length).to(gpu)}
        chunked_segment_rollout(model, {"input_ids": tokens(1, 512).to(gpu)}, chunk_size=256, backward=True)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _, metrics = chunked_segment_rollout(model, batch, chunk_size=2048, backward=True, **options)
        return torch.cuda.max_memory_allocated() - before, int(metrics["carry_bytes"])

    return measure


def test_memory_grows_by_the_carry_and_by_nothing_in_host_memory(peak_bytes):
    peaks = {n: peak_bytes(n, gradient_checkpointing=True) for n in (32_768, 65_536)}
    growth, carry = (peaks[65_536][i] - peaks[32_768][i] for i in range(2))
    assert carry == 32_768 * 2 * 2 * 3 * 512 * 2  # keys and values, their gradients, layers, width, bytes
    assert growth < 1.05 * carry + MIB

    offloaded = [peak_bytes(n, use_cpu_offload=True)[0] for n in (32_768, 65_536)]
    assert offloaded[1] - offloaded[0] < 0.1 * carry


def test_a_chunk_size_that_is_found_by_free_memory_fits_in_it(gpu, make_model, tokens):
    sizes = {"hidden_size": 512, "head_dim": 64, "num_attention_heads": 8, "num_key_value_heads": 8}
    model = make_model("llama", max_position_embeddings=2**20, **sizes).to(gpu, torch.bfloat16)
    batch = {"input_ids": tokens(1, 32_768).to(gpu)}
    chunked_segment_rollout(model, {"input_ids": tokens(1, 512).to(gpu)}, chunk_size=256, backward=True)
    allowed = free_device_bytes(CausalLM(model).device) // 16
    sizer = ChunkSizer(model, exact=True, use_cpu_offload=False, gradient_checkpointing=True)
    chosen = sizer.tokens(1, 32_768, free_bytes=allowed)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()

    chunked_segment_rollout(model, batch, chunk_size=chosen, gradient_checkpointing=True, backward=True)

    assert torch.cuda.max_memory_allocated() - before <= allowed


_OFFLOADED = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from metaflow_hf.rollout import chunked_segment_rollout
sizes = dict(hidden_size=128, intermediate_size=128, num_attention_heads=2, num_key_value_heads=2, vocab_size=64)
model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes)).to("cuda", torch.bfloat16)
ids = torch.randint(0, 64, (1, 2000), device="cuda")
chunked_segment_rollout(model, {"input_ids": ids}, chunk_size=256, use_cpu_offload=True, backward=True)
print("done")
"""


def test_no_two_streams_meet_as_the_sanitizer_of_torch_sees_it(gpu):
    result = subprocess.run(
        [sys.executable, "-c", _OFFLOADED],
        env={**os.environ, "TORCH_CUDA_SANITIZER": "1"},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=100,
    )

    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout == "done\n"
