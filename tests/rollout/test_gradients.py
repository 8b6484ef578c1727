"""Gradients of the rollout against full backpropagation, in fp64, family by family.

Every family meets every chunk size once, each time with another case, so that every family meets most cases and
every chunk size all of them; WHOLE_MATRIX=1 runs the whole product of the three.
"""

from __future__ import annotations

import contextlib
import os

import pytest
import torch
import torch.nn.functional as F
from rollout.cases import CASES, LENGTH

from metaflow_hf.rollout import chunked_segment_rollout

CHUNK_SIZES = (1, 7, 32, LENGTH - 1, LENGTH, LENGTH + 100)
# Attention of all kinds, absolute and relative positions, caps and scales, MoE, MLA, states, convolutions, hybrids.
MATRIX = (
    *("llama", "qwen3", "mistral", "gpt2", "gemma2", "bloom"),
    *("granite", "deepseek_v2", "llama4_text", "qwen3_next", "mamba2", "lfm2", "falcon_h1"),
)
EAGER = ("gemma2", "bloom", "qwen3", "granite", "mamba2", "gpt_neo", "gpt_oss")
OTHERS = ("qwen2", "gpt_neox", "phi", "opt", "gpt_neo", "olmo2", "cohere", "stablelm", "qwen2_moe", "gpt_oss")


def _meetings():
    for row, family in enumerate(MATRIX):
        for column, chunk_size in enumerate(CHUNK_SIZES):
            for number, case in enumerate(CASES):
                if "WHOLE_MATRIX" in os.environ or number == (row + 3 * column) % len(CASES):
                    yield pytest.param(family, chunk_size, case, id=f"{family}-{chunk_size}-{case.__name__}")
    for family in OTHERS:
        yield pytest.param(family, 7, CASES[2], id=f"{family}-7-{CASES[2].__name__}")


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated", "ignore:The following .*pattern keys"
)
@pytest.mark.parametrize(("family", "chunk_size", "make_case"), list(_meetings()))
def test_gradients_are_those_of_full_backprop(
    family,
    chunk_size,
    make_case,
    make_model,
    tokens,
    full_backprop,
    gradients_of,
    assert_equal_gradients,
    offloading,
):
    attention = "eager" if family in EAGER else "sdpa"
    case = make_case(make_model(family, _attn_implementation=attention), tokens(3, LENGTH))
    expected_loss, expected = 0.0, {}
    for document in case.documents:
        loss, found = full_backprop(case.model, document, divisor=case.count)
        expected_loss += loss.item()
        expected |= {name: gradient + expected.get(name, 0) for name, gradient in found.items()}

    rolled = 0.0
    for batch in case.batches:
        with offloading if "use_cpu_offload" in case.options else contextlib.nullcontext():
            loss, metrics = chunked_segment_rollout(
                case.model,
                batch,
                chunk_size=chunk_size,
                num_items_in_batch=case.count,
                backward=case.backward,
                **case.options,
            )
            if not case.backward:
                loss.backward()
        rolled += loss.item()

    assert rolled == pytest.approx(expected_loss, rel=1e-11)
    assert_equal_gradients(gradients_of(case.model), expected)
    assert metrics["effective_seq_len"] == LENGTH


def test_left_padding_without_position_ids_does_not_move_the_tokens(
    make_model, tokens, full_backprop, gradients_of, assert_equal_gradients
):
    model, ids = make_model("gpt2"), tokens(1, LENGTH)
    _, expected = full_backprop(model, {"input_ids": ids})
    pad = ids.new_zeros(1, 9)
    labels = torch.cat([pad - 100, ids], 1)
    labels[0, 9] = -100
    padded = {
        "input_ids": torch.cat([pad, ids], 1),
        "attention_mask": torch.cat([pad, torch.ones_like(ids)], 1),
        "labels": labels,
    }

    chunked_segment_rollout(model, padded, chunk_size=6, backward=True)

    assert_equal_gradients(gradients_of(model), expected)


def test_sdpa_counts_the_first_token_after_left_padding_as_transformers_does(
    make_model, tokens, full_backprop, gradients_of, assert_equal_gradients
):
    model, ids = make_model(), tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    _, expected = full_backprop(model, batch)

    _, metrics = chunked_segment_rollout(
        model, {"input_ids": ids, "attention_mask": mask}, chunk_size=8, backward=True
    )

    assert metrics["num_tokens"] == 2 * (LENGTH - 1) - 10
    assert_equal_gradients(gradients_of(model), expected)


@pytest.mark.parametrize("backward", [False, True])
def test_truncated_gradients_are_those_of_a_detached_past(
    backward, make_model, tokens, gradients_of, assert_equal_gradients
):
    from transformers import DynamicCache

    model, ids = make_model("llama"), tokens(2, LENGTH)
    cache, chunk_size = DynamicCache(config=model.config), 8
    for start in range(0, LENGTH - 1, chunk_size):
        stop = min(start + chunk_size, LENGTH)
        stop = LENGTH if LENGTH - stop == 1 else stop
        for layer in cache.layers[: len(cache.layers) if start else 0]:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
        logits = model(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True).logits
        targets = F.pad(ids, (0, 1), value=-100)[:, start + 1 : stop + 1]
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / (2 * (LENGTH - 1))
        loss.backward()
    expected = gradients_of(model)
    model.zero_grad()

    loss, _ = chunked_segment_rollout(
        model, {"input_ids": ids}, 1, 8, gradient="truncated", backward=backward
    )
    if not backward:
        loss.backward()

    assert_equal_gradients(gradients_of(model), expected)


def test_exact_and_truncated_differ(make_model, tokens, gradients_of):
    model, batch = make_model(), {"input_ids": tokens(1, LENGTH)}
    found = {}
    for kind in ("exact", "truncated"):
        model.zero_grad()
        chunked_segment_rollout(model, batch, chunk_size=8, gradient=kind, backward=True)
        found[kind] = gradients_of(model)
    assert any(
        not torch.allclose(found["exact"][n], found["truncated"][n], rtol=1e-3) for n in found["exact"]
    )
