"""The carry in host memory: streamed block by block it gives the same gradients, and moves the bytes it should."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
from rollout.conftest import gradients

from metaflow_hf.rollout import chunked_segment_rollout
from metaflow_hf.rollout.causal_lm import CausalLM
from metaflow_hf.rollout.host_memory import HostTransfers
from metaflow_hf.rollout.passes import ChunkPasses, Plan
from metaflow_hf.rollout.sequence import TokenSequence

LENGTH = 48
CHUNK = 8


@pytest.fixture
def offloaded():
    """offloaded(model, batch, by_blocks=True): gradients added with the carry in host memory, the passes."""

    def run(model, batch, *, by_blocks=True, exact=True):
        lm = CausalLM(model)
        sequence = TokenSequence.from_batch(batch, -100, lm.device)
        plan = Plan(
            chunk_size=CHUNK,
            exact=exact,
            use_cpu_offload=True,
            gradient_checkpointing=True,
            ce_loss_fn=None,
            attention_by_blocks=by_blocks,
        )
        passes = ChunkPasses(lm, sequence, plan, linear_head=False)
        passes.losses_and_backward(torch.tensor(1.0 / sequence.num_targets(), dtype=torch.float64))
        return passes

    return run


@pytest.mark.parametrize("block_tokens", [3, 5, 1000])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_blocks_of_any_size_give_the_gradients_of_full_backprop(
    family,
    block_tokens,
    make_model,
    tokens,
    full_backprop,
    gradients_of,
    assert_equal_gradients,
    offloaded,
    monkeypatch,
):
    model, batch = make_model(family), {"input_ids": tokens(2, LENGTH)}
    bytes_per_token = 2 * 2 * 8 * 8  # rows, heads, head size, bytes
    monkeypatch.setattr("metaflow_hf.rollout.blocks._BLOCK_BYTES", block_tokens * bytes_per_token)
    _, expected = full_backprop(model, batch)

    offloaded(model, batch)

    assert_equal_gradients(gradients_of(model), expected)


@pytest.mark.parametrize("family", ["bloom", "llama"])
def test_attention_on_all_keys_and_padded_rows(
    family, make_model, tokens, full_backprop, gradients_of, assert_equal_gradients, offloaded
):
    ids = tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 11] = -100
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    model = make_model(family)
    full = batch if family == "bloom" else {**batch, "position_ids": positions}
    _, expected = full_backprop(model, full)

    offloaded(model, batch, by_blocks=family != "bloom")

    assert_equal_gradients(gradients_of(model), expected)


@pytest.mark.parametrize(
    ("window", "chunk_size", "exact"),
    [*itertools.product((2, 11, 20, 60), (5, 8), (True,)), (20, 8, False), (12, 16, False)],
)
def test_windows_and_padding_through_streams_give_the_gradients_of_a_carry_on_the_device(
    window, chunk_size, exact, make_model, tokens, gradients_of, assert_equal_gradients, offloading
):
    """A label on the first token after the padding keeps the mask, and with it other spans for each row."""
    model, ids = make_model("mistral", num_hidden_layers=1, sliding_window=window), tokens(2, 34)
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    found = []
    for offload in (False, True):
        model.zero_grad()
        with offloading if offload else contextlib.nullcontext():
            chunked_segment_rollout(
                model,
                batch,
                chunk_size=chunk_size,
                gradient="exact" if exact else "truncated",
                gradient_checkpointing=True,
                use_cpu_offload=offload,
                backward=True,
            )
        found.append(gradients_of(model))

    assert_equal_gradients(found[1], found[0])


@pytest.mark.parametrize("family", ["bloom", "gpt_oss", "falcon_h1"])
def test_two_calls_through_streams(
    family, make_model, tokens, full_backprop, gradients_of, assert_equal_gradients, offloading
):
    model, batch = make_model(family, _attn_implementation="eager"), {"input_ids": tokens(2, LENGTH)}
    _, expected = full_backprop(model, batch)

    with offloading:
        loss, _ = chunked_segment_rollout(model, batch, chunk_size=7, use_cpu_offload=True)
        loss.backward()

    assert_equal_gradients(gradients_of(model), expected)


@pytest.mark.parametrize(
    "forgotten", ["await_event", "event_of_computation", "the stores' event", "the loads' events"]
)
def test_an_order_that_is_forgotten_is_a_race(forgotten, make_model, tokens, offloading, monkeypatch):
    store, stage = HostTransfers.store, HostTransfers.stage
    if forgotten == "the stores' event":
        monkeypatch.setattr(HostTransfers, "store", lambda *arguments: store(*arguments) and None)
    elif forgotten == "the loads' events":
        monkeypatch.setattr(HostTransfers, "stage", lambda self, blocks, _: stage(self, blocks, []))
    else:
        monkeypatch.setattr(HostTransfers, forgotten, lambda *_: None)

    with offloading:
        chunked_segment_rollout(
            make_model(), {"input_ids": tokens(1, LENGTH)}, chunk_size=8, use_cpu_offload=True, backward=True
        )

    assert offloading.races
    offloading.races.clear()


def test_bytes_that_go_to_the_device_and_back(make_model, tokens, offloaded):
    model = make_model("llama")

    passes = offloaded(model, {"input_ids": tokens(1, LENGTH)})

    transfers, num_chunks = passes._carry.transfers, LENGTH // CHUNK
    token = 3 * 2 * 2 * 8 * 8  # layers, keys and values, heads, head size, bytes
    pasts = token * CHUNK * num_chunks * (num_chunks - 1) // 2
    last_past = token * (LENGTH - CHUNK)
    own = token * LENGTH
    assert transfers.loaded_bytes == 4 * pasts - last_past + own
    assert transfers.stored_bytes == pasts + own


def test_truncated_moves_no_gradient(make_model, tokens, offloaded):
    passes = offloaded(make_model("llama"), {"input_ids": tokens(1, LENGTH)}, exact=False)

    token, num_chunks = 3 * 2 * 2 * 8 * 8, LENGTH // CHUNK
    assert passes._carry.transfers.stored_bytes == token * LENGTH
    assert passes._carry.transfers.loaded_bytes == 2 * token * CHUNK * num_chunks * (num_chunks - 1) // 2


def test_a_carry_that_host_memory_cannot_hold_is_refused_before_any_gradient(
    make_model, tokens, offloading, monkeypatch
):
    """Keys and values would fit alone; the error comes in the first token chunk, with what helps."""
    model, batch = make_model(), {"input_ids": tokens(1, LENGTH)}
    whole = 2 * 2 * 3 * 2 * 8 * 8 * LENGTH  # gradients, keys and values, layers, heads, head size, bytes
    monkeypatch.setattr(
        "metaflow_hf.rollout.host_memory.usable_memory", lambda: (whole - 1, "the container's limit")
    )

    with pytest.raises(
        MemoryError, match=r"more than .* GiB .*\(the container's limit\).*gradient: truncated"
    ):
        chunked_segment_rollout(model, batch, chunk_size=8, use_cpu_offload=True, backward=True)

    assert not gradients(model)
    chunked_segment_rollout(
        model, batch, chunk_size=8, use_cpu_offload=True, backward=True, gradient="truncated"
    )


def test_what_only_rounding_makes_too_large_is_a_warning(make_model, tokens, offloading, monkeypatch, caplog):
    whole = 2 * 2 * 3 * 2 * 8 * 8 * LENGTH
    monkeypatch.setattr("metaflow_hf.rollout.host_memory.usable_memory", lambda: (whole, "the machine's"))

    chunked_segment_rollout(
        make_model(), {"input_ids": tokens(1, LENGTH)}, chunk_size=8, use_cpu_offload=True, backward=True
    )

    assert caplog.text.count("PYTORCH_ALLOC_CONF=pinned_max_round_threshold_mb:64") == 1


def test_an_area_is_used_again_only_after_it_was_given_back():
    transfers = HostTransfers(torch.device("cpu"))
    blocks = [torch.full((1, 1, 4, 2), float(i)) for i in range(3)]
    first, second = (transfers.stage([block], []) for block in blocks[:2])
    assert first.wait()[0].unique().tolist() == [0.0]
    first.release()
    third = transfers.stage([blocks[2]], [])

    assert second.wait()[0].unique().tolist() == [1.0]
    assert third.wait()[0].unique().tolist() == [2.0]
