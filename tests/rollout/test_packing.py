"""Padding and packed documents: gradients are those of one pass, and of each document alone."""

from __future__ import annotations

import pytest
import torch

from metaflow_hf.rollout import chunked_segment_rollout
from metaflow_hf.rollout.packing import documents_apart, without_mask
from metaflow_hf.rollout.sequence import TokenSequence

LENGTHS = ((17, 3, 9, 12), (1, 25, 2, 13))


def _packed(ids, lengths=LENGTHS):
    """Rows of documents; the first token of each is no label, as collators for packing have it."""
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    return {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions == 0, -100)}


def test_packed_documents_are_those_of_transformers_block_diagonal_pass(
    make_model, tokens, full_backprop, gradients_of, assert_equal_gradients
):
    """Labels at borders included: the last token of a document predicts the first of the next, as one shift has it."""
    model, batch = make_model(), {**_packed(tokens(2, 41)), "labels": tokens(2, 41, seed=5)}
    _, expected = full_backprop(model, {**batch, "use_cache": False})
    chunked_segment_rollout(model, batch, chunk_size=7, backward=True)
    assert_equal_gradients(gradients_of(model), expected)


def test_packed_rows_may_be_padded_with_and_without_a_mask(
    make_model, tokens, gradients_of, assert_equal_gradients
):
    model, batch = make_model(), _packed(tokens(2, 41))
    chunked_segment_rollout(model, batch, chunk_size=7, backward=True)
    expected = gradients_of(model)
    mask = torch.ones(2, 47, dtype=torch.long)
    mask[0, 41:] = 0
    mask[1, :6] = 0

    def padded(tensor, value):
        right = torch.nn.functional.pad(tensor[0], (0, 6), value=value)
        return torch.stack([right, torch.nn.functional.pad(tensor[1], (6, 0), value=value)])

    wide = {
        "input_ids": padded(batch["input_ids"], 0),
        "labels": padded(batch["labels"], -100),
        "position_ids": padded(batch["position_ids"], 0),
    }
    for extra in ({}, {"attention_mask": mask}):
        model.zero_grad()
        chunked_segment_rollout(model, {**wide, **extra}, chunk_size=7, backward=True)
        assert_equal_gradients(gradients_of(model), expected)


def test_documents_of_similar_length_stand_together():
    ids = torch.arange(2 * 41).reshape(2, 41)
    batch = _packed(ids)
    sequence = TokenSequence.from_batch(batch, -100, torch.device("cpu"))
    parts = documents_apart(sequence, chunk_size=8)
    shapes = [tuple(part.input_ids.shape) for part in parts]
    assert shapes == [(2, 25), (2, 13), (1, 9), (2, 3)]
    assert sum(part.num_targets() for part in parts) == sequence.num_targets()
    first = parts[0]
    assert first.input_ids[0].tolist() == list(range(42, 67))
    assert first.position_ids[1, :17].tolist() == list(range(17))
    assert first.targets[1, 16:].eq(-100).all()


@pytest.mark.parametrize("family", ["llama", "opt", "bart", "mamba2", "lfm2", "falcon_h1"])
def test_left_padding_longer_than_a_token_chunk(
    family, make_model, tokens, full_backprop, gradients_of, assert_equal_gradients
):
    model, ids = make_model(family), tokens(2, 41)
    mask = torch.ones_like(ids)
    mask[1, :23] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, 23] = -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    positions = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if family == "llama" else {}
    _, expected = full_backprop(model, {**batch, **positions})
    chunked_segment_rollout(model, batch, chunk_size=7, backward=True)
    assert_equal_gradients(gradients_of(model), expected)


def test_padding_needs_no_mask_where_nothing_looks_at_it(tokens):
    ids, mask = tokens(3, 20), torch.ones(3, 20, dtype=torch.long)
    mask[0, 15:] = 0
    mask[1, :6] = 0
    mask[2, 12:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, 6] = -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    given = TokenSequence.from_batch(batch, -100, ids.device)
    rows = without_mask(given, movable=True)
    assert rows.attention_mask is None
    assert rows.input_ids.shape == (3, 15)
    assert rows.input_ids[1, :14].tolist() == ids[1, 6:].tolist()
    assert rows.position_ids.max() == given.position_ids.max()
    assert rows.num_targets() == given.num_targets()


@pytest.mark.parametrize("what", ["hole", "label on padding"])
def test_a_mask_that_is_needed_stays(
    what, make_model, tokens, full_backprop, gradients_of, assert_equal_gradients
):
    model, ids = make_model(), tokens(2, 41)
    mask, labels = torch.ones_like(ids), ids.clone()
    if what == "hole":
        mask[1, 9:14] = 0
        labels[1, 9:15] = -100
    else:
        mask[1, 30:] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, "position_ids": positions}
    _, expected = full_backprop(model, batch)
    chunked_segment_rollout(model, batch, chunk_size=7, backward=True)
    assert_equal_gradients(gradients_of(model), expected)
