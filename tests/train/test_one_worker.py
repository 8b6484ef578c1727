"""One worker is plain training, whatever happens in between."""

import json
import math

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from metaflow_hf.data.order import ClaimOrder
from metaflow_hf.errors import TrainingIncomplete
from metaflow_hf.events import ClaimDone, RoundClosed, StepDone, WorkLost
from metaflow_hf.train.lineage import Lineage


def final_weights(store, tmp_path) -> dict[str, torch.Tensor]:
    newest = Lineage(store).newest()
    assert newest.manifest.final
    path = tmp_path / "final.safetensors"
    store.download(newest.manifest.weights.key, path)
    return load_file(path)


def plain_training(model_dir, rows_of_block: list[list[str]]) -> dict[str, torch.Tensor]:
    """The same training as anybody would write it down: no claims, no rounds, no store."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).train()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    named = sorted(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for _, p in named if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for _, p in named if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(0.9, 0.95),
        eps=1e-8,
        fused=True,
    )
    order = ClaimOrder([40, 40, 10], 20, 5, seed=7)
    for position in range(order.num_positions):
        span = order.locate(position)
        stream: list[int] = []
        for offset in order.row_order(position):
            text = rows_of_block[span.block_id][span.start + offset]
            stream += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        pieces = [stream[start : start + 32] for start in range(0, len(stream), 32)]
        batches = [pieces[start : start + 4] for start in range(0, len(pieces), 4)]
        batches = [batch for batch in batches if sum(len(piece) - 1 for piece in batch)]
        for number, batch in enumerate(batches):
            width = max(map(len, batch))
            ids = torch.tensor([piece + [1] * (width - len(piece)) for piece in batch])
            mask = torch.tensor([[1] * len(piece) + [0] * (width - len(piece)) for piece in batch])
            labels = torch.where(mask == 1, ids, -100)
            model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
            done = (position + number / len(batches)) / order.num_positions
            if done < 0.02:
                rate = 1e-2 * max(done / 0.02, 0.01)
            else:
                rate = 1e-2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (1 - (1 - (done - 0.02) / 0.98)))))
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in named}


@pytest.fixture(scope="session")
def rows(dataset_dir) -> list[list[str]]:
    files = sorted((dataset_dir / "blocks").glob("*.jsonl"))
    return [[json.loads(line)["text"] for line in file.read_text("utf-8").splitlines()] for file in files]


@pytest.fixture(scope="session")
def plain(model_dir, rows) -> dict[str, torch.Tensor]:
    return plain_training(model_dir, rows)


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_one_worker_equals_a_plain_training_loop_bit_for_bit(training, plain, tmp_path):
    training.start(rounds={"seconds": 0.05})
    training.work()
    assert Lineage(training.store).newest().number > 1
    assert_equal(final_weights(training.store, tmp_path), plain)


@pytest.mark.parametrize("rounds", [1, 3])
def test_a_killed_worker_goes_on_bit_for_bit_from_the_last_closed_round(training, plain, tmp_path, rounds):
    class Killed(BaseException):
        pass

    def die(event):
        if isinstance(event, RoundClosed):
            die.closed += 1
        if isinstance(event, StepDone) and die.closed == rounds and event.step % 2 == 0:
            raise Killed

    die.closed = 0
    training.start(rounds={"seconds": 0.05})
    with pytest.raises(Killed):
        training.work(on_event=die)
    before = Lineage(training.store).newest()
    assert before.number == rounds
    assert not before.manifest.final
    training.work()
    assert_equal(final_weights(training.store, tmp_path), plain)


def test_a_stopped_worker_publishes_what_it_finished_and_says_that_it_is_not_over(training, plain, tmp_path):
    import threading

    stop = threading.Event()
    finished = []

    def listen(event):
        if isinstance(event, ClaimDone):
            finished.append(event.position)
            if len(finished) == 3:
                stop.set()

    training.start(rounds={"seconds": 60.0})
    with pytest.raises(TrainingIncomplete, match="told to stop"):
        training.work(stop=stop, on_event=listen)
    training.work()
    closed = Lineage(training.store).round(1).manifest
    assert closed.done == [(0, 3)]
    assert closed.failures == {}
    assert_equal(final_weights(training.store, tmp_path), plain)


def test_the_budget_of_tokens_ends_the_run_and_the_schedule(training):
    steps = []
    training.start(rounds={"max_tokens": 1000})
    training.work(on_event=lambda event: steps.append(event) if isinstance(event, StepDone) else None)
    manifest = Lineage(training.store).newest().manifest
    assert manifest.final
    assert 1000 <= manifest.tokens < 1000 + 250
    assert sum(step.tokens for step in steps) == manifest.tokens
    assert steps[-1].learning_rate < 0.3 * max(step.learning_rate for step in steps)
    assert steps[-1].tokens_total == manifest.tokens


def test_several_epochs_train_every_row_as_often(training):
    spec = training.start(data={"epochs": 3})
    training.work()
    manifest = Lineage(training.store).newest().manifest
    assert spec.num_positions == 3 * 18
    assert manifest.done == [(0, 54)]


def test_work_that_is_lost_with_its_round_leaves_no_trace(training, plain, tmp_path, monkeypatch):
    """The round is closed by somebody else at the worst moment: all is stored but the record that names it."""
    publish = Lineage.publish
    lost = []

    def publish_too_late(self, number, delta):
        if number == 1 and not lost:
            base = self.round(number)
            self.create_round(
                msgspec.structs.replace(
                    base.manifest, nonce="other", round=2, parent=base.digest, accepted=[], empty_rounds=1
                )
            )
        return publish(self, number, delta)

    monkeypatch.setattr(Lineage, "publish", publish_too_late)
    training.start(rounds={"seconds": 0.05})
    training.work(on_event=lambda event: lost.append(event) if isinstance(event, WorkLost) else None)
    assert len(lost) == 1
    assert_equal(final_weights(training.store, tmp_path), plain)
