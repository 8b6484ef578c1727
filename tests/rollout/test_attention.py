"""Attention by blocks: spans against masks, kernels against autograd, models without a mask over the past."""

from __future__ import annotations

import contextlib
import itertools
import logging

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from metaflow_hf.rollout import attention, chunked_segment_rollout, probe_model
from metaflow_hf.rollout.kernels import FlashCPU, FlashCUDA, Padded, Tiled
from metaflow_hf.rollout.visibility import Pattern, Shape, Span

LENGTH = 41
PATTERNS = [Pattern(), *(Pattern(window=w) for w in (1, 4, 9)), *(Pattern(chunk=c) for c in (1, 5, 9))]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_spans_cover_what_the_pattern_lets_see_and_each_pair_once(pattern):
    for first, start, length in itertools.product((0, 1, 6), (6, 7, 13, 20), (1, 2, 8, 17)):
        stop = start + length
        query, key = torch.arange(start, stop)[:, None], torch.arange(stop)[None]
        expected = (pattern.sees(query, key, torch.tensor(first)) & (key >= first)).int()
        found = torch.zeros_like(expected)
        for span in pattern.spans(start, stop, first, None):
            parts = [span] if span.shape is Shape.CAUSAL else span.split(start)
            assert all(part.k1 <= start or part.k0 >= start for part in parts)
            for part in parts:
                found[part.q0 - start : part.q1 - start, part.k0 : part.k1] += _seen(part)
        assert torch.equal(found, expected), (first, start, stop)


def _seen(span: Span):
    full = torch.ones(span.q1 - span.q0, span.k1 - span.k0, dtype=torch.int)
    if span.shape is Shape.FULL:
        return full
    assert full.shape[0] == full.shape[1]
    return full.tril() if span.shape is Shape.CAUSAL else full.triu()


@pytest.mark.parametrize(
    ("kernel", "value_head"),
    [(FlashCPU(), 8), (Tiled(), 8), (Tiled(), 6), (Tiled(softcap=1.5), 8), (Padded(FlashCPU(), 8), 6)],
    ids=["flash", "tiled", "tiled-heads", "softcap", "padded"],
)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_two_blocks_of_keys_give_the_gradients_of_one_softmax(kernel, value_head, heads, monkeypatch):
    monkeypatch.setattr(
        "metaflow_hf.rollout.kernels._TILE_BYTES", 2**14
    )  # several tiles, of 16 queries at least
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    q, k, v = random(2, heads[0], 37, 8), random(2, heads[1], 60, 8), random(2, heads[1], 60, value_head)
    groups, scale = heads[0] // heads[1], 0.4
    scores = q @ k.repeat_interleave(groups, 1).transpose(2, 3) * scale
    if isinstance(kernel, Tiled) and kernel._softcap is not None:
        scores = kernel._softcap * torch.tanh(scores / kernel._softcap)
    hidden = torch.ones(37, 60, dtype=torch.bool).triu(60 - 37 + 1)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    expected = weights @ v.repeat_interleave(groups, 1)
    grad = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    wanted = torch.autograd.grad(expected, (q, k, v), grad)

    past, current = slice(0, 60 - 37), slice(60 - 37, 60)
    blocks = [(past, False), (current, True)]
    with torch.no_grad():
        (out, lse), (out_b, lse_b) = (
            kernel.forward(q, k[:, :, at], v[:, :, at], scale, c) for at, c in blocks
        )
        out, lse = out.lerp(out_b, torch.sigmoid(lse_b - lse)[..., None]), torch.logaddexp(lse, lse_b)
        parts = [kernel.backward(grad, q, k[:, :, at], v[:, :, at], out, lse, scale, c) for at, c in blocks]
    found = (parts[0][0] + parts[1][0], *(torch.cat(pair, 2) for pair in list(zip(*parts, strict=True))[1:]))

    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    for gradient, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_torch_knows_the_kernel_for_cuda_as_it_is_called(dtype, causal):
    """Its shapes alone, which torch tells without the device."""
    q, grad = (torch.empty(2, 8, 300, 64, dtype=dtype, device="meta") for _ in range(2))
    k, v = (torch.empty(2, 2, 300 if causal else 777, 64, dtype=dtype, device="meta") for _ in range(2))

    out, lse = FlashCUDA().forward(q, k, v, 0.125, causal)
    gradients = FlashCUDA().backward(grad, q, k, v, out, lse, 0.125, causal)

    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, dtype, q.shape[:3], torch.float32)
    assert [g.shape for g in gradients] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize(
    "family",
    ["llama", "qwen3", "mistral", "gpt2", "gpt_neox", "gemma2", "opt", "qwen2_moe", "llama4_text", "gpt_oss"],
)
def test_families_whose_past_is_read_by_blocks(family, make_model):
    assert probe_model(make_model(family), refresh=True).attention_by_blocks


def test_a_family_with_attention_code_of_its_own_keeps_it_and_the_log_says_so(make_model, caplog):
    caplog.set_level(logging.INFO, "metaflow_hf.rollout")

    report = probe_model(make_model("bloom"), refresh=True)

    assert report.exact
    assert not report.attention_by_blocks
    assert "attention as the model has it" in caplog.text


def test_no_tensor_spans_the_token_chunk_and_the_past(make_model, tokens):
    model = make_model("llama", num_attention_heads=4, num_key_value_heads=1)
    length, chunk = 1024, 128
    batch = {"input_ids": tokens(1, length)}
    probe_model(model)
    sizes = []
    for by_blocks in (True, False):
        with _LargestTensor() as largest, pytest.MonkeyPatch.context() as patch:
            if not by_blocks:
                patch.setattr("metaflow_hf.rollout.passes.attention_by_blocks", _not_by_blocks)
            chunked_segment_rollout(model, batch, chunk_size=chunk, backward=True)
        sizes.append(largest.numel)

    assert sizes[0] < length * chunk <= sizes[1]


def _not_by_blocks(*_):
    return contextlib.nullcontext()


class _LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("chunk_size", [4, 8, 16])
@pytest.mark.parametrize("family", ["mistral", "llama4_text", "gemma2"])
def test_windows_shorter_and_longer_than_a_token_chunk(
    family, chunk_size, make_model, tokens, full_backprop, gradients_of, assert_equal_gradients
):
    model, batch = make_model(family), {"input_ids": tokens(2, LENGTH)}
    _, expected = full_backprop(model, batch)

    chunked_segment_rollout(model, batch, chunk_size=chunk_size, backward=True)

    assert_equal_gradients(gradients_of(model), expected)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_padding_between_tokens_takes_the_mask_of_transformers(
    family, make_model, tokens, full_backprop, gradients_of, assert_equal_gradients, caplog
):
    caplog.set_level(logging.INFO, "metaflow_hf.rollout")
    attention._log_once.cache_clear()
    ids = tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, 13:15] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    labels = ids.masked_fill(mask == 0, -100)
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels}
    model = make_model(family)
    _, expected = full_backprop(model, batch)

    chunked_segment_rollout(model, batch, chunk_size=8, backward=True)

    assert_equal_gradients(gradients_of(model), expected)
    assert "padding between attended tokens" in caplog.text


def test_attention_dropout_takes_the_attention_of_transformers(
    make_model, tokens, gradients_of, assert_equal_gradients, caplog, monkeypatch
):
    caplog.set_level(logging.INFO, "metaflow_hf.rollout")
    attention._log_once.cache_clear()
    model, batch = make_model("llama", attention_dropout=0.3), {"input_ids": tokens(2, LENGTH)}
    probe_model(model)
    found = []
    for by_blocks in (True, False):
        if not by_blocks:
            monkeypatch.setattr("metaflow_hf.rollout.passes.attention_by_blocks", _not_by_blocks)
        model.zero_grad()
        torch.manual_seed(3)
        chunked_segment_rollout(model, batch, chunk_size=8, backward=True)
        found.append(gradients_of(model))

    assert_equal_gradients(*found)
    assert "(attention dropout)" in caplog.text


def test_the_attention_of_the_model_is_put_back_after_an_error(make_model, tokens):
    model = make_model("llama")

    def fail(_logits, _targets):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        chunked_segment_rollout(model, {"input_ids": tokens()}, chunk_size=8, ce_loss_fn=fail, backward=True)

    assert model.config._attn_implementation == "sdpa"


def test_autocast_casts_queries_and_keys_but_not_the_sums(make_model, tokens, gradients_of):
    """A soft cap's tiled kernel under autocast: as near to fp32 as transformers' own attention is."""
    model, batch = make_model("gemma2", dtype=torch.float32), {"input_ids": tokens(1, LENGTH)}
    found = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            chunked_segment_rollout(model, batch, chunk_size=8, backward=True)
        found.append(torch.cat([g.flatten() for g in gradients_of(model).values()]))
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**batch, labels=batch["input_ids"]).loss.backward()
    own = torch.cat([g.flatten() for g in gradients_of(model).values()])

    error, own_error = ((g - found[0]).norm() / found[0].norm() for g in (found[1], own))
    assert error < 1.2 * own_error


def test_sums_over_many_token_chunks_are_as_near_to_the_truth_as_one_pass(make_model, tokens, gradients_of):
    """What 32 chunks send to the first keys is added in bf16, the type of the keys under autocast."""
    model, batch = (
        make_model(dtype=torch.float32, max_position_embeddings=1024),
        {"input_ids": tokens(1, 1024)},
    )
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.1)

    def keys_and_values(step, *, bf16):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            step()
        found = {n: g for n, g in gradients_of(model).items() if "k_proj" in n or "v_proj" in n}
        return torch.cat([gradient.flatten() for gradient in found.values()])

    def one_pass():
        model(**batch, labels=batch["input_ids"]).loss.backward()

    def rollout():
        chunked_segment_rollout(model, batch, chunk_size=16, backward=True)

    truth = keys_and_values(one_pass, bf16=False)
    errors = [
        float((keys_and_values(step, bf16=True) - truth).norm() / truth.norm())
        for step in (rollout, one_pass)
    ]
    assert errors[0] < 1.15 * errors[1]
