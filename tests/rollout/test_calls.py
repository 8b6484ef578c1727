"""What callers rely on: both call styles, counts, accumulation, adapters, and that nothing stays changed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from metaflow_hf.rollout import chunked_segment_rollout

LENGTH = 29


@pytest.fixture
def batch(tokens):
    return {"input_ids": tokens(2, LENGTH)}


def test_a_scaled_loss_scales_the_gradients(make_model, batch, gradients_of, assert_equal_gradients):
    model = make_model()
    loss, _ = chunked_segment_rollout(model, batch, chunk_size=8)
    loss.backward()
    once = gradients_of(model)
    model.zero_grad()

    loss, _ = chunked_segment_rollout(model, batch, chunk_size=8)
    (loss * 3).backward()

    assert_equal_gradients(gradients_of(model), {name: 3 * gradient for name, gradient in once.items()})


def test_a_second_backward_raises(make_model, batch):
    loss, _ = chunked_segment_rollout(make_model(), batch, chunk_size=8)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="ran twice"):
        loss.backward()


def test_the_one_pass_style_returns_a_loss_without_graph(make_model, batch):
    loss, _ = chunked_segment_rollout(make_model(), batch, chunk_size=8, backward=True)
    assert not loss.requires_grad


def test_without_gradients_only_the_loss_is_computed(make_model, batch, full_backprop):
    model = make_model()
    expected, _ = full_backprop(model, batch)
    with torch.no_grad():
        loss, _ = chunked_segment_rollout(model, batch, chunk_size=8)
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("backward", [False, True])
def test_all_labels_ignored_gives_zero(backward, make_model, batch):
    model = make_model()
    labels = torch.full_like(batch["input_ids"], -100)
    loss, metrics = chunked_segment_rollout(
        model, {**batch, "labels": labels}, chunk_size=8, backward=backward
    )
    if not backward:
        loss.backward()
    assert loss.item() == 0
    assert metrics["num_tokens"] == 0
    assert metrics["ce"] == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_gradients_accumulate_over_batches_with_one_common_count(
    make_model, tokens, full_backprop, gradients_of, assert_equal_gradients
):
    model, ids = make_model(), tokens(4, LENGTH)
    labels = ids.clone()
    labels[0, 3:20] = -100
    _, expected = full_backprop(model, {"input_ids": ids, "labels": labels})
    count = (labels[:, 1:] != -100).sum()

    for rows in (slice(0, 2), slice(2, 4)):
        part = {"input_ids": ids[rows], "labels": labels[rows]}
        chunked_segment_rollout(model, part, chunk_size=8, num_items_in_batch=count, backward=True)

    assert_equal_gradients(gradients_of(model), expected)


def test_metrics_tell_what_was_done(make_model, batch):
    loss, metrics = chunked_segment_rollout(make_model(), batch, max_segments=5, chunk_size=8)
    keys_and_values = (
        3 * 2 * (2 * 2 * LENGTH * 8) * 8
    )  # layers, k and v, [batch, heads, tokens, head_dim], fp64
    assert metrics == {
        "ce": pytest.approx(loss.item()),
        "num_chunks": 4,
        "used_segments": 1,
        "effective_seq_len": LENGTH,
        "num_tokens": 2 * (LENGTH - 1),
        "carry_bytes": 2 * keys_and_values,
    }


def test_a_last_token_chunk_of_one_token_joins_the_one_before(make_model, batch):
    _, metrics = chunked_segment_rollout(make_model(), batch, chunk_size=7)
    assert LENGTH % 7 == 1
    assert metrics["num_chunks"] == 4


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_loss_function_of_ones_own(
    family, reduction, make_model, batch, full_backprop, gradients_of, assert_equal_gradients
):
    model = make_model(family)
    _, expected = full_backprop(model, batch)

    def loss_fn(logits, targets):
        assert logits.ndim == 2
        assert targets.ndim == 1
        return 2 * F.cross_entropy(logits, targets, reduction=reduction)

    labels = F.pad(batch["input_ids"], (0, 3), value=-1)
    ids = F.pad(batch["input_ids"], (0, 3))
    mask = (labels != -1).long()
    chunked_segment_rollout(
        model,
        {"input_ids": ids, "labels": labels, "attention_mask": mask},
        chunk_size=8,
        ce_loss_fn=loss_fn,
        ignore_index=-1,
        backward=True,
    )
    assert_equal_gradients(gradients_of(model), {n: 2 * g for n, g in expected.items()}, tolerance=1e-9)


def test_logits_in_blocks_are_exact(
    make_model, batch, full_backprop, gradients_of, assert_equal_gradients, monkeypatch
):
    monkeypatch.setattr("metaflow_hf.rollout.loss._BLOCK_BYTES", {"cpu": 61 * 4 * 3})
    model = make_model()
    _, expected = full_backprop(model, batch)
    chunked_segment_rollout(model, batch, chunk_size=16, backward=True)
    assert_equal_gradients(gradients_of(model), expected)


def test_frozen_parts_get_no_gradient_and_the_others_the_right_one(
    make_model, batch, full_backprop, gradients_of, assert_equal_gradients
):
    model = make_model()
    model.get_input_embeddings().weight.requires_grad_(False)
    for parameter in model.model.layers[0].parameters():
        parameter.requires_grad_(False)
    _, expected = full_backprop(model, batch)
    chunked_segment_rollout(model, batch, chunk_size=8, backward=True)
    assert_equal_gradients(gradients_of(model), expected)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_lora_adapters_get_the_gradients_of_full_backprop(
    make_model, batch, full_backprop, gradients_of, assert_equal_gradients
):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(make_model(), config)
    _, expected = full_backprop(model, batch)
    chunked_segment_rollout(model, batch, chunk_size=8, backward=True)
    assert all("lora_" in name for name in expected)
    assert_equal_gradients(gradients_of(model), expected)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_is_replayed(
    checkpointing, backward, make_model, batch, gradients_of, assert_equal_gradients
):
    """The reference keeps every chunk's graph and draws its masks once, in the same order."""
    from transformers import DynamicCache

    model = make_model("gpt2", attn_pdrop=0.2, embd_pdrop=0.2, resid_pdrop=0.2)
    ids, cache, total = batch["input_ids"], DynamicCache(config=model.config), 0.0
    chunked_segment_rollout(model, batch, chunk_size=8, backward=True)
    model.zero_grad()
    torch.manual_seed(7)
    for start in range(0, LENGTH, 8):
        logits = model(input_ids=ids[:, start : start + 8], past_key_values=cache, use_cache=True).logits
        targets = F.pad(ids, (0, 1), value=-100)[:, start + 1 : start + 9]
        total = total + F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    (total / (2 * (LENGTH - 1))).backward()
    expected, drawn = gradients_of(model), torch.rand(())
    model.zero_grad()

    torch.manual_seed(7)
    loss, _ = chunked_segment_rollout(
        model, batch, chunk_size=8, gradient_checkpointing=checkpointing, backward=backward
    )
    after_forward = torch.get_rng_state()
    if not backward:
        torch.rand(5)
        loss.backward()
        torch.set_rng_state(after_forward)

    assert loss.item() == pytest.approx(total.item() / (2 * (LENGTH - 1)), rel=1e-12)
    assert_equal_gradients(gradients_of(model), expected)
    assert torch.equal(torch.rand(()), drawn)


@pytest.mark.parametrize("backward", [False, True])
def test_autocast_is_entered_again_by_the_backward_pass(backward, make_model, batch, gradients_of):
    model = make_model(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(**batch).logits[:, :-1].float().flatten(0, 1)
        F.cross_entropy(logits, batch["input_ids"][:, 1:].flatten()).backward()
        expected = gradients_of(model)
        model.zero_grad()
        loss, metrics = chunked_segment_rollout(model, batch, chunk_size=8, backward=backward)
    if not backward:
        loss.backward()
    found = gradients_of(model)
    assert metrics["carry_bytes"] < 2 * 3 * 2 * (2 * 2 * LENGTH * 8) * 4  # transformers leaves keys in fp32
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 0.05 * gradient.norm(), name


@pytest.mark.parametrize("backward", [False, True])
def test_gradients_of_a_bf16_model_may_be_fp32(backward, make_model, tokens, gradients_of):
    """Sums over many token chunks then lose nothing to the parameters' type."""
    model, batch = make_model(dtype=torch.bfloat16), {"input_ids": tokens(2, 150)}
    exact = make_model()
    exact.load_state_dict(model.state_dict())
    chunked_segment_rollout(exact, batch, chunk_size=64, backward=True)
    expected = gradients_of(exact)

    def error(grad_dtype):
        for parameter in model.parameters():
            parameter.grad = None
            parameter.grad_dtype = grad_dtype
        loss, _ = chunked_segment_rollout(model, batch, chunk_size=4, backward=backward)
        if not backward:
            loss.backward()
        found = gradients_of(model)
        assert {gradient.dtype for gradient in found.values()} == {grad_dtype}
        return sum(float((found[n].double() - g).norm() / g.norm()) for n, g in expected.items())

    assert error(torch.float32) < error(torch.bfloat16)


def test_the_models_own_gradient_checkpointing_does_not_drop_the_past(
    make_model, batch, full_backprop, gradients_of, assert_equal_gradients
):
    model = make_model()
    _, expected = full_backprop(model, batch)
    model.activation_checkpointing_enable()
    chunked_segment_rollout(model, batch, chunk_size=8, backward=True)
    assert_equal_gradients(gradients_of(model), expected)
    assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}])
def test_everything_is_as_before_after_an_exception(options, make_model, batch):
    model = make_model()
    model.activation_checkpointing_enable()
    model.model.layers[1].eval()
    before, calls = _state(model), []

    def fail(logits, targets):
        calls.append(len(targets))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chunked_segment_rollout(model, batch, chunk_size=8, ce_loss_fn=fail, backward=True, **options)

    assert calls
    assert _state(model) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"max_segments": 0}, "max_segments is 0"),
        ({"gradient": "approximate"}, "gradient is 'approximate'"),
        ({"num_items_in_batch": -1}, "num_items_in_batch is -1"),
    ],
)
def test_senseless_arguments_are_refused(arguments, message, make_model, batch):
    with pytest.raises(ValueError, match=message):
        chunked_segment_rollout(make_model(), batch, **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_type_ids": torch.zeros(2, LENGTH)}, "token_type_ids"),
        ({"labels": torch.zeros(2, LENGTH - 1)}, r"batch\['labels'\]"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, "is empty"),
        ({"input_ids": [[1, 2]]}, "needs input_ids"),
    ],
)
def test_a_batch_that_cannot_be_cut_is_refused(change, message, make_model, batch):
    with pytest.raises(ValueError, match=message):
        chunked_segment_rollout(make_model(), {**batch, **change})


@pytest.mark.parametrize("backward", [False, True])
def test_labels_ignored_by_another_number_than_ignore_index_are_refused(backward, make_model, batch):
    labels = batch["input_ids"].clone()
    labels[1, 7:] = -100
    with pytest.raises(ValueError, match=r"batch\['labels'\]\[1, 7\] is -100: .*ignore_index \(-1\)"):
        chunked_segment_rollout(
            make_model(), {**batch, "labels": labels}, chunk_size=8, ignore_index=-1, backward=backward
        )


def test_nothing_to_train_is_refused(make_model, batch):
    model = make_model().requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter"):
        chunked_segment_rollout(model, batch, backward=True)


@pytest.mark.parametrize("backward", [False, True])
def test_an_optimizer_that_steps_in_a_hook_steps_once_on_the_whole_gradient(
    backward, make_model, batch, full_backprop, assert_equal_gradients
):
    model, steps = make_model(), []
    _, expected = full_backprop(model, batch)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    names = {parameter: name for name, parameter in model.named_parameters()}

    def step(parameter):
        steps.append(names[parameter])
        with torch.no_grad():
            parameter -= parameter.grad
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    frozen = model.model.norm.weight.requires_grad_(False)
    loss, _ = chunked_segment_rollout(model, batch, chunk_size=8, backward=backward)
    if not backward:
        loss.backward()

    assert sorted(steps) == sorted(name for p, name in names.items() if p is not frozen)
    moved = {name: before[name] - p.detach() for p, name in names.items() if p is not frozen}
    assert_equal_gradients(moved, {name: expected[name] for name in moved}, tolerance=1e-9)


def test_hooks_of_parameters_wait_in_vain_for_a_call_that_fails(make_model, batch):
    model, calls = make_model(), []
    parameter = model.lm_head.weight
    parameter.register_post_accumulate_grad_hook(calls.append)

    def loss_fn(logits, targets):
        if logits.requires_grad and parameter.grad is not None:
            raise RuntimeError("in the middle")
        return F.cross_entropy(logits, targets, reduction="sum")

    with pytest.raises(RuntimeError, match="in the middle"):
        chunked_segment_rollout(model, batch, chunk_size=8, ce_loss_fn=loss_fn, backward=True)
    assert calls == []
    parameter.sum().backward()
    assert len(calls) == 1


@pytest.mark.parametrize("change", ["weights", "mode"])
def test_a_backward_pass_after_weights_or_mode_changed_is_refused(change, make_model, batch):
    model = make_model()
    loss, _ = chunked_segment_rollout(model, batch, chunk_size=8)
    if change == "weights":
        with torch.no_grad():
            model.model.norm.weight *= 1.1
        message = "model.norm.weight was modified in place"
    else:
        model.eval()
        message = "training to evaluation mode"
    with pytest.raises(RuntimeError, match=message):
        loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters())


def _state(model):
    modules = [
        (m.training, getattr(m, "gradient_checkpointing", None), "forward" in vars(m))
        for m in model.modules()
    ]
    return modules, model.config.to_json_string(), [p.requires_grad for p in model.parameters()]
