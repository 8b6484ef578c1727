"""One worker in fp32 beside transformers' Trainer on the same batches: the same losses. And nothing piles up."""

import gc
from pathlib import Path

import pytest
import torch
from bench.parts.hf_trainer import batches_of, make_setting, plain_loop, train_ours, train_theirs

from metaflow_hf.events import StepDone
from metaflow_hf.store import open_store

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1}


def test_fifty_steps_have_the_losses_of_the_trainer(tmp_path: Path):
    setting = make_setting(tmp_path, rows=300, sequence_length=64, batch_size=4, claim_samples=10, **SHAPE)
    store = open_store(tmp_path / "store")
    steps: list[StepDone] = []
    train_ours(setting, store, 50, lambda event: steps.append(event) if isinstance(event, StepDone) else None)
    batches = batches_of(setting, store, 50)
    assert [step.tokens for step in steps] == [batch.num_tokens for batch in batches]
    ours = [step.loss for step in steps]
    assert ours[-1] < ours[0] - 1
    assert ours == pytest.approx(train_theirs(setting, batches, tmp_path / "trainer"), abs=1e-5)
    assert ours == pytest.approx(plain_loop(setting, batches), abs=1e-5)


def test_the_tensors_of_a_step_are_released(tmp_path: Path):
    setting = make_setting(tmp_path, rows=450, sequence_length=32, batch_size=2, claim_samples=10, **SHAPE)
    held: list[int] = []

    def count(event) -> None:
        if isinstance(event, StepDone) and event.step % 50 == 0:
            gc.collect()
            held.append(sum(item.nbytes for item in gc.get_objects() if issubclass(type(item), torch.Tensor)))

    train_ours(setting, open_store(tmp_path / "store"), 200, count)
    assert len(held) == 4
    # A claim made ready ahead may be a batch longer than another.
    assert max(held) - min(held) < 100_000, held
