"""Models with a recurrent carry: deep supervision segments, the carry constant between them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaflow_hf.rollout import chunked_segment_rollout

COUNT = 2 * 12
SEGMENTS = 3


@dataclass
class Thought:
    states: dict[str, list[Tensor]]
    halted: Tensor
    steps: int = 0


class Step:
    def __init__(self, carry, loss):
        self.carry, self.loss = carry, loss


class Thinker(nn.Module):
    """A cell that reads the sequence again in each segment and predicts the next token from its state."""

    def __init__(self, *, halts_after: int = 100, as_object: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding, self.cell = nn.Embedding(20, 8), nn.GRUCell(8, 8)
        self.start, self.head, self.drop = nn.Parameter(torch.randn(8)), nn.Linear(8, 20), nn.Dropout(dropout)
        self.halts_after, self.as_object = halts_after, as_object

    def initial_carry(self, batch):
        batch_size = batch["input_ids"].shape[0]
        return Thought({"h": [self.start.expand(batch_size, 8)]}, torch.zeros(batch_size, dtype=torch.bool))

    def forward(self, carry, batch):
        state, total = carry.states["h"][0], 0.0
        for token, label in zip(batch["input_ids"][:, :-1].T, batch["labels"][:, 1:].T, strict=True):
            state = self.cell(self.drop(self.embedding(token)), state)
            total = total + F.cross_entropy(self.head(state), label, reduction="sum")
        steps = carry.steps + 1
        halted = torch.full_like(carry.halted, steps >= self.halts_after)
        carry = Thought({"h": [state]}, halted, steps)
        return Step(carry, total) if self.as_object else (carry, total)


@pytest.fixture
def batch(tokens):
    return {"input_ids": tokens(2, 13) % 20}


def _reference(model, batch, segments):
    model.zero_grad()
    full = {**batch, "labels": batch["input_ids"]}
    carry, total = model.initial_carry(full), 0.0
    for _ in range(segments):
        output = model(carry, full)
        carry, loss = (output.carry, output.loss) if isinstance(output, Step) else output
        total = total + loss / COUNT / segments
        carry = Thought({"h": [carry.states["h"][0].detach()]}, carry.halted, carry.steps)
    total.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return total.item(), gradients


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("as_object", [False, True])
def test_losses_and_gradients_are_averaged_over_segments(
    as_object, backward, batch, gradients_of, assert_equal_gradients
):
    torch.manual_seed(0)
    model = Thinker(as_object=as_object).double()
    expected_loss, expected = _reference(model, batch, SEGMENTS)

    loss, metrics = chunked_segment_rollout(
        model, batch, max_segments=SEGMENTS, chunk_size=4, backward=backward
    )
    if not backward:
        loss.backward()

    assert loss.item() == pytest.approx(expected_loss, rel=1e-12)
    assert metrics["used_segments"] == SEGMENTS
    assert metrics["num_tokens"] == COUNT
    assert metrics["carry_bytes"] == (SEGMENTS - 1) * (2 * 8 * 8 + 2)
    assert_equal_gradients(gradients_of(model), expected)


def test_a_model_may_end_early(batch, gradients_of, assert_equal_gradients):
    torch.manual_seed(0)
    model = Thinker(halts_after=2).double()
    _, expected = _reference(model, batch, 2)
    _, metrics = chunked_segment_rollout(model, batch, max_segments=9, backward=True)
    assert metrics["used_segments"] == 2
    assert_equal_gradients(gradients_of(model), expected)


@pytest.mark.parametrize("backward", [False, True])
def test_dropout_is_replayed_in_every_segment(backward, batch, gradients_of, assert_equal_gradients):
    torch.manual_seed(0)
    model = Thinker(dropout=0.3).double()
    torch.manual_seed(5)
    expected_loss, expected = _reference(model, batch, SEGMENTS)
    torch.manual_seed(5)
    loss, _ = chunked_segment_rollout(model, batch, max_segments=SEGMENTS, backward=backward)
    if not backward:
        torch.rand(3)
        loss.backward()
    assert loss.item() == pytest.approx(expected_loss, rel=1e-12)
    assert_equal_gradients(gradients_of(model), expected)


def test_such_a_model_computes_its_own_loss(batch):
    with pytest.raises(ValueError, match="computes its own loss"):
        chunked_segment_rollout(Thinker(), batch, ce_loss_fn=F.cross_entropy)
