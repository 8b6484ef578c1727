"""The head's loss and gradients, block by block, against autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from metaflow_hf.rollout import chunked_segment_rollout
from metaflow_hf.rollout.head import adds_its_gradients, head_and_loss_backward
from metaflow_hf.rollout.loss import head_loss_backward

TOKENS, HIDDEN, VOCABULARY = 23, 12, 301
SCALE = torch.tensor(0.37, dtype=torch.float64)


@pytest.fixture
def head():
    torch.manual_seed(0)
    return nn.Linear(HIDDEN, VOCABULARY, dtype=torch.float64)


@pytest.fixture
def rows_and_labels():
    generator = torch.Generator().manual_seed(1)
    rows = 30 * torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    return rows, torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)


def _in_fp32(head):
    narrow = nn.Linear(HIDDEN, VOCABULARY, dtype=torch.float32)
    narrow.load_state_dict(head.state_dict())
    return narrow


def _by_autograd(head, rows, labels):
    leaf = rows.clone().requires_grad_()
    loss = F.cross_entropy(head(leaf), labels, reduction="sum")
    (SCALE * loss).backward()
    found = leaf.grad, *(p.grad for p in head.parameters())
    head.zero_grad()
    return loss.detach(), found


@pytest.mark.parametrize("block", [1, 7, TOKENS])
def test_loss_and_gradients_are_those_of_autograd_and_are_added(block, head, rows_and_labels):
    rows, labels = rows_and_labels
    expected_loss, expected = _by_autograd(head, rows, labels)
    for parameter in head.parameters():
        parameter.grad = torch.ones_like(parameter)

    loss, of_rows = head_and_loss_backward(head, rows, labels, SCALE, block)

    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    for found, right in zip((of_rows, *(p.grad - 1 for p in head.parameters())), expected, strict=True):
        assert (found - right).norm() <= 1e-12 * right.norm()


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_frozen_parameter_gets_no_gradient_and_the_others_theirs(frozen, head, rows_and_labels):
    rows, labels = rows_and_labels
    _, (of_rows, *_) = _by_autograd(head, rows, labels)
    getattr(head, frozen).requires_grad_(False)

    _, found = head_and_loss_backward(head, rows, labels, SCALE, 7)

    torch.testing.assert_close(found, of_rows, rtol=1e-11, atol=1e-12)
    assert getattr(head, frozen).grad is None
    assert all(p.grad.abs().sum() > 0 for p in head.parameters() if p.requires_grad)


def test_bf16_products_with_fp32_gradients_are_as_near_as_autocast(head, rows_and_labels):
    rows, labels = rows_and_labels[0] / 30, rows_and_labels[1]
    _, expected = _by_autograd(head, rows, labels)
    narrow, rows = _in_fp32(head), torch.empty(rows.shape).copy_(rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, of_autocast = _by_autograd(narrow, rows, labels)
        leaf = rows[None].requires_grad_()
        _, of_rows = head_loss_backward(narrow, leaf, labels[None], -100, None, SCALE)

    found = of_rows[0], *(p.grad for p in narrow.parameters())
    assert {gradient.dtype for gradient in found} == {torch.float32}
    for ours, theirs, right in zip(found, of_autocast, expected, strict=True):
        error, their_error = ((g.double() - right).norm() / right.norm() for g in (ours, theirs))
        assert error < max(1.5 * their_error, 5e-3)


def test_no_second_tensor_of_the_weights_size_exists(head, rows_and_labels):
    rows, labels = rows_and_labels
    for parameter in head.parameters():
        parameter.grad = torch.zeros_like(parameter)
    known = {t.untyped_storage().data_ptr() for p in head.parameters() for t in (p, p.grad)}

    with _LargestNew(known) as largest:
        head_and_loss_backward(head, rows, labels, SCALE, 4)

    assert 0 < largest.numel <= 4 * VOCABULARY < head.weight.numel()


class _LargestNew(TorchDispatchMode):
    def __init__(self, known):
        super().__init__()
        self.known, self.numel = known, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.numel = max(self.numel, tensor.numel())
        return result


def test_where_blocks_would_lose_precision_or_surprise_a_hook_the_whole_chunk_is_added_at_once(head):
    assert adds_its_gradients(head, torch.float64)
    head = _in_fp32(head)
    assert adds_its_gradients(head, torch.float32)
    assert adds_its_gradients(head, torch.bfloat16)
    assert not adds_its_gradients(head, torch.float16)
    head.weight.grad_dtype = None
    head.weight.grad = torch.zeros_like(head.weight, dtype=torch.bfloat16)
    assert not adds_its_gradients(head, torch.bfloat16)
    head.weight.grad = None
    head.weight.register_hook(lambda gradient: gradient)
    assert not adds_its_gradients(head, torch.float32)


def test_hooks_on_the_head_see_one_gradient_a_token_chunk(make_model, tokens):
    model, seen = make_model("llama", tie_word_embeddings=False), []
    model.lm_head.weight.register_hook(lambda gradient: seen.append(gradient.shape))
    chunked_segment_rollout(model, {"input_ids": tokens(1, 24)}, chunk_size=8, backward=True)

    assert len(seen) == 3


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("kind", ["gradient_hook", "own_forward"])
def test_what_is_put_on_a_plain_head_runs_although_the_model_was_tried_before(
    kind, backward, make_model, tokens, gradients_of, assert_equal_gradients
):
    model, ids = make_model("llama", tie_word_embeddings=False), tokens(2, 24)
    chunked_segment_rollout(model, {"input_ids": ids}, chunk_size=8, backward=True)
    model.zero_grad()
    head = model.lm_head
    if kind == "gradient_hook":
        head.register_full_backward_pre_hook(lambda _module, gradients: (3 * gradients[0],))
    else:
        head.forward = lambda states: 2 * F.linear(states, head.weight)
    logits = model(input_ids=ids).logits[:, :-1]
    F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    expected = gradients_of(model)
    model.zero_grad()

    loss, _ = chunked_segment_rollout(model, {"input_ids": ids}, chunk_size=8, backward=backward)
    if not backward:
        loss.backward()

    assert_equal_gradients(gradients_of(model), expected)
