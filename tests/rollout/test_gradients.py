"""Gradients of the rollout against full backpropagation, in fp64, family by family."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from metaflow_hf.rollout import chunked_segment_rollout

LENGTH = 41


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 7, 32, LENGTH - 1, LENGTH, LENGTH + 100])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_any_chunk_size_gives_the_gradients_of_full_backprop(
    family, chunk_size, backward, make_model, tokens, full_backprop, gradients_of, assert_equal_gradients
):
    model, batch = make_model(family), {"input_ids": tokens(2, LENGTH)}
    expected_loss, expected = full_backprop(model, batch)

    loss, _ = chunked_segment_rollout(model, batch, chunk_size=chunk_size, backward=backward)
    if not backward:
        loss.backward()

    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-12)
    assert_equal_gradients(gradients_of(model), expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "family",
    [
        *(
            "llama",
            "qwen2",
            "qwen3",
            "mistral",
            "gpt2",
            "gpt_neox",
            "phi",
            "gemma2",
            "opt",
            "bloom",
            "gpt_neo",
        ),
        *("granite", "olmo2", "cohere", "stablelm", "qwen2_moe", "deepseek_v2", "llama4_text"),
    ],
)
def test_every_family_with_padding_on_both_sides(
    family, attention, make_model, tokens, full_backprop, gradients_of, assert_equal_gradients
):
    if (family, attention) in {("gemma2", "sdpa"), ("bloom", "sdpa"), ("gpt_neo", "sdpa")}:
        pytest.skip("this family has no such attention")
    model, batch = make_model(family, _attn_implementation=attention), _padded(tokens(3, LENGTH))
    _, expected = full_backprop(model, batch)

    chunked_segment_rollout(model, batch, chunk_size=8, backward=True)

    assert_equal_gradients(gradients_of(model), expected)


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


def test_labels_that_are_ignored_across_whole_token_chunks(
    make_model, tokens, full_backprop, gradients_of, assert_equal_gradients
):
    ids = tokens(2, LENGTH)
    labels = ids.clone()
    labels[:, 5:30] = -100
    labels[1] = -100
    model, batch = make_model(), {"input_ids": ids, "labels": labels}
    expected_loss, expected = full_backprop(model, batch)

    loss, metrics = chunked_segment_rollout(model, batch, chunk_size=8, backward=True)

    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-12)
    assert metrics["num_tokens"] == int((labels[:, 1:] != -100).sum())
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


@pytest.mark.parametrize("option", [{"gradient_checkpointing": True}, {"use_cpu_offload": True}])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "qwen2_moe"])
def test_memory_options_are_exact(
    family, option, make_model, tokens, full_backprop, gradients_of, assert_equal_gradients
):
    model, batch = make_model(family), {"input_ids": tokens(2, LENGTH)}
    _, expected = full_backprop(model, batch)

    chunked_segment_rollout(model, batch, chunk_size=8, backward=True, **option)

    assert_equal_gradients(gradients_of(model), expected)


def _padded(ids):
    """Row 0 is whole, row 1 padded on the left across more than one token chunk, row 2 on the right."""
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    mask[2, -11:] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, 11] = -100
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels}
