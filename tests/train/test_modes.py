"""How a step is made: accumulated, in half precision, with other optimisers, and when numbers are not finite."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from metaflow_hf.config import TrainConfig
from metaflow_hf.errors import ConfigError, NonFiniteLoss
from metaflow_hf.train import nonfinite
from metaflow_hf.train.models import load_model, trained_parameters
from metaflow_hf.train.nonfinite import save_bad_step
from metaflow_hf.train.optimizers import parameter_groups
from metaflow_hf.train.schedule import Schedule

from .test_trainer import claim_of, trainer_of, weights_after

TEXTS = [f"the name of a list is {n} and the value of it is not in the file" for n in range(12)]


def losses_of(trainer, texts=TEXTS, rate=1e-2) -> list[float]:
    return [step.loss for step in trainer.train(claim_of(texts), lambda part, tokens: rate)]


@pytest.mark.parametrize("packing", [True, False])
def test_batches_that_are_accumulated_are_one_large_batch(training, packing):
    # Without packing sequences have different numbers of tokens: a mean of means would be another step.
    data = {"packing": packing}
    whole = trainer_of(training, TEXTS, data={**data, "batch_size": 6})
    parts = trainer_of(
        training, TEXTS, data={**data, "batch_size": 2}, optimizer={"gradient_accumulation_steps": 3}
    )
    assert losses_of(whole) == pytest.approx(losses_of(parts), rel=1e-5)
    for name, value in trained_parameters(whole._engine.model).items():
        torch.testing.assert_close(value, trained_parameters(parts._engine.model)[name], rtol=1e-4, atol=2e-5)


def test_long_sequences_are_accumulated_too(training):
    texts = [" ".join(TEXTS), " ".join(TEXTS[:7])]
    settings = {"rollout": {"use_chunked_training": True, "chunk_size": 16}}
    accumulated = trainer_of(training, texts, optimizer={"gradient_accumulation_steps": 2}, **settings)
    plain = trainer_of(training, texts, optimizer={"gradient_accumulation_steps": 2}, **settings)
    plain._engine.gradients._is_rolled_out = lambda batch: False
    assert losses_of(accumulated, texts) == pytest.approx(losses_of(plain, texts), rel=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_close_and_weights_stay_in_fp32(training, dtype):
    half = trainer_of(training, TEXTS, model={"dtype": dtype})
    expected = losses_of(trainer_of(training, TEXTS))
    found = losses_of(half)
    assert found == pytest.approx(expected, rel=2e-2)
    assert found != expected
    assert {p.dtype for p in half._engine.parameters.values()} == {torch.float32}


def test_a_step_that_overflows_in_fp16_is_repeated_with_less(training):
    usual = trainer_of(training, TEXTS, model={"dtype": "float16"})
    high = trainer_of(training, TEXTS, model={"dtype": "float16"})
    high._engine.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    found = losses_of(high)
    assert high._engine.scaler.get_scale() < 2.0**40
    assert found == pytest.approx(losses_of(usual), rel=1e-2)
    assert all(map(math.isfinite, found))


@pytest.mark.parametrize(
    "sections",
    [{"model": {"dtype": "float16"}}, {"optimizer": {"name": "adamw_8bit"}}],
    ids=["fp16", "8 bit"],
)
def test_the_state_of_the_optimiser_goes_on_bit_for_bit(training, tmp_path, sections):
    def fresh():
        return trainer_of(training, TEXTS, **sections)

    through, first = fresh(), fresh()
    for trainer in (through, first):
        losses_of(trainer)
    first.keep()
    base = tmp_path / "base.safetensors"
    first.write(base, _zeros(tmp_path, first), "weights")
    first.write_inner(tmp_path / "inner.safetensors")
    second = fresh()
    second.load(base, tmp_path / "inner.safetensors")
    expected = weights_after(through, TEXTS)
    for name, value in weights_after(second, TEXTS).items():
        assert torch.equal(value, expected[name]), name
    if first._engine.scaler is not None:
        assert second._engine.scaler.get_scale() == through._engine.scaler.get_scale()


def _zeros(tmp_path: Path, trainer) -> Path:
    from metaflow_hf.train.tensors import write_all

    path = tmp_path / "zeros.safetensors"
    write_all(path, {name: torch.zeros_like(p) for name, p in trainer._engine.parameters.items()})
    return path


def test_eight_bit_moments_learn_as_well_and_are_kept_in_a_byte(training):
    full = losses_of(trainer_of(training, TEXTS * 3, optimizer={"learning_rate": 1e-2}), TEXTS * 3)
    eight = trainer_of(training, TEXTS * 3, optimizer={"learning_rate": 1e-2, "name": "adamw_8bit"})
    assert losses_of(eight, TEXTS * 3)[-1] == pytest.approx(full[-1], rel=0.05)
    state = eight._engine.optimizer.state[eight._engine.parameters["model.embed_tokens.weight"]]
    assert state["state1"].dtype == torch.uint8


def test_without_the_package_eight_bits_say_what_to_install(training, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"pip install 'metaflow-hf\[bitsandbytes\]'"):
        trainer_of(training, TEXTS, optimizer={"name": "adamw_8bit"})


def test_weights_decay_in_matrices_only(training):
    model = load_model(training.model_dir, training.config.model)
    parameters = trained_parameters(model)
    settings = training.config.optimizer

    def decaying(**changes) -> set[str]:
        groups = parameter_groups(parameters, settings.model_copy(update=changes), model)
        chosen = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
        assert sum(len(group["params"]) for group in groups) == len(parameters)
        return {name for name, p in parameters.items() if id(p) in chosen}

    with_embeddings = decaying()
    assert "model.embed_tokens.weight" in with_embeddings
    assert not any("norm" in name for name in with_embeddings)
    assert with_embeddings - decaying(decay_embeddings=False) == {"model.embed_tokens.weight"}


def test_warmup_stable_decay():
    schedule = Schedule(1.0, "wsd", 0.1, 0.0, decay_fraction=0.2)
    assert [schedule.at(x) for x in (0.05, 0.1, 0.5, 0.8, 0.9, 1.0)] == pytest.approx([0.5, 1, 1, 1, 0.5, 0])


def test_gradients_are_clipped_or_not(training):
    def norm_of_step(limit) -> float:
        trainer = trainer_of(training, TEXTS, optimizer={"max_grad_norm": limit})
        batches = [trainer.batches(claim_of(TEXTS))[0]]
        trainer._engine.optimizer.step = lambda: norms.append(
            float(torch.nn.utils.get_total_norm([p.grad for p in trainer._engine.parameters.values()]))
        )
        norms: list[float] = []
        trainer._step(batches, 1e-2)
        return norms[0]

    assert norm_of_step(None) > 0.5
    assert norm_of_step(0.5) == pytest.approx(0.5, rel=1e-4)


def poisoned(trainer, bad_calls: set[int], what: float = math.nan):
    """The gradients of some steps are not finite, though their loss is."""
    add = trainer._engine.gradients.add
    calls = iter(range(10**6))

    def add_and_poison(batches, **arguments):
        loss = add(batches, **arguments)
        if next(calls) in bad_calls:
            next(iter(trainer._engine.parameters.values())).grad.fill_(what)
        return loss

    trainer._engine.gradients.add = add_and_poison
    return trainer


def test_gradients_that_are_not_finite_stop_before_they_reach_the_weights(training, tmp_path):
    from metaflow_hf.store import open_store

    saved = []

    def save(step):
        saved.append(step)
        return save_bad_step(open_store(tmp_path / "lineage"), step)

    trainer = poisoned(trainer_of(training, TEXTS), {1})
    trainer._save_bad = save
    steps = []
    with pytest.raises(
        NonFiniteLoss, match=r"norm of the gradients became nan .*step 2 of position 0 "
    ) as error:
        for step in trainer.train(claim_of(TEXTS), lambda part, tokens: 1e-2):
            steps.append(step)
    assert len(steps) == 1
    assert all(bool(p.isfinite().all()) for p in trainer._engine.parameters.values())
    (path,) = (tmp_path / "lineage" / "nonfinite").iterdir()
    assert str(path) in str(error.value).replace("file://", "")
    kept = json.loads(path.read_text())
    assert (kept["block_id"], kept["start"], kept["stop"], kept["step"]) == (0, 0, len(TEXTS), 2)
    second = trainer.batches(claim_of(TEXTS))[1]
    assert kept["input_ids"] == [
        ids[mask.bool()].tolist() for ids, mask in zip(second.input_ids, second.attention_mask, strict=True)
    ]


def test_or_are_left_out_where_that_is_configured(training, caplog):
    trainer = poisoned(trainer_of(training, TEXTS, optimizer={"on_non_finite": "skip"}), {1}, math.inf)
    total = len(trainer.batches(claim_of(TEXTS)))
    losses = losses_of(trainer)
    assert len(losses) == total - 1 > 1
    assert all(bool(p.isfinite().all()) for p in trainer._engine.parameters.values())
    assert "training goes on without it" in caplog.text


def test_a_step_that_is_left_out_costs_fp16_no_precision(training):
    """The loss scale was lowered in vain; with the rest of it later gradients would vanish, for thousands of steps."""
    trainer = trainer_of(training, TEXTS, model={"dtype": "float16"}, optimizer={"on_non_finite": "skip"})
    poisoned(trainer, set(range(1, 18)), math.inf)
    scales = [trainer._engine.scaler.get_scale()]
    for _ in trainer.train(claim_of(TEXTS), lambda part, tokens: 1e-2):
        scales.append(trainer._engine.scaler.get_scale())
    assert len(scales) == len(trainer.batches(claim_of(TEXTS)))
    assert set(scales) == {2.0**16}


def test_but_not_for_ever(training, monkeypatch):
    monkeypatch.setattr("metaflow_hf.train.trainer.MOST_IN_A_ROW", 2)
    assert nonfinite.MOST_IN_A_ROW >= 2
    trainer = poisoned(
        trainer_of(training, TEXTS, data={"batch_size": 1}, optimizer={"on_non_finite": "skip"}),
        set(range(100)),
    )
    with pytest.raises(NonFiniteLoss, match="the 3th in a row"):
        losses_of(trainer)


def test_a_compiled_model_trains_the_same(training, monkeypatch):
    compiled = []

    original = torch.nn.Module.compile
    # What inductor makes of the trace takes a minute here, and is torch's own.
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self: compiled.append(self) or original(self, backend="eager")
    )
    texts = TEXTS[:4]
    expected = losses_of(trainer_of(training, texts), texts)
    trainer = trainer_of(training, texts, model={"compile": True})
    assert compiled == [trainer._engine.model]
    assert losses_of(trainer, texts) == pytest.approx(expected, rel=1e-5)
    trainer.keep()
    assert (
        trainer._engine.kept.keys()
        == dict(AutoModelForCausalLM.from_pretrained(training.model_dir).named_parameters()).keys()
    )


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"model": {"repo_id": "a/b", "reference": "TrainFlow/1"}},
            "model: repo_id and reference both say where to begin",
        ),
        ({"model": {"initialise": "random", "lora": {}}}, "model: adapters on random weights learn nothing"),
        (
            {"optimizer": {"schedule": "wsd", "decay_fraction": 1.0}},
            "optimizer: warmup_fraction 0.02 and decay_fraction 1",
        ),
        (
            {"optimizer": {"name": "adam"}},
            "optimizer.name: must be 'adamw' or 'adamw_8bit', got 'adam'; did you mean 'adamw'?",
        ),
        ({"optimizer": {"gradient_acumulation_steps": 2}}, "did you mean 'gradient_accumulation_steps'?"),
    ],
)
def test_what_does_not_go_together_is_said(values, said):
    with pytest.raises(ConfigError) as error:
        TrainConfig.parse(values)
    assert said in str(error.value)
