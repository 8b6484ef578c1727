"""A worker of several processes does what one process does: the same losses, the same weights."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from metaflow_hf.errors import ConfigError, TrainingIncomplete
from metaflow_hf.events import RoundClosed, StepDone
from metaflow_hf.train import sharding, team
from metaflow_hf.train.engine import Engine
from metaflow_hf.train.lineage import Lineage
from metaflow_hf.train.models import load_model
from metaflow_hf.train.sharding import Replicas

from .test_one_worker import final_weights


def losses_and_weights(training, tmp_path, name: str, **rounds):
    training.lineage = name
    training.store = training.store.child(name)
    steps: list[StepDone] = []
    training.start(rounds={"max_tokens": 1500, "seconds": 60.0, **rounds})
    training.work(on_event=lambda event: steps.append(event) if isinstance(event, StepDone) else None)
    (tmp_path / name).mkdir()
    return [step.loss for step in steps], final_weights(training.store, tmp_path / name)


@pytest.fixture
def alone(training, tmp_path):
    """One process, in batches that are accumulated: odd ones do not divide by two."""
    training.config = training.config.replace(
        data={"batch_size": 3}, optimizer={"gradient_accumulation_steps": 2}
    )
    root = training.store
    found = losses_and_weights(training, tmp_path, "alone")
    training.store = root
    return found


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_the_same_as_one(training, alone, tmp_path, parallel):
    losses, weights = losses_and_weights(training, tmp_path, parallel, gpus_per_worker=2, parallel=parallel)
    assert losses == pytest.approx(alone[0], rel=1e-4)
    assert len(losses) > 5
    for name, value in alone[1].items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_optimisers_go_on_where_they_stopped_with_another_number_of_processes(training, tmp_path, parallel):
    """Two processes begin, one goes on: as if one had done it all."""
    root = training.store
    expected, _ = losses_and_weights(training, tmp_path, "through", seconds=0.05)
    training.store = root.child("two")
    training.lineage = "two"
    training.start(rounds={"gpus_per_worker": 2, "parallel": parallel})

    class Killed(BaseException):
        pass

    losses: list[float] = []

    def listen(event):
        if isinstance(event, StepDone):
            losses.append(event.loss)
        if isinstance(event, RoundClosed):
            raise Killed

    with pytest.raises(Killed):
        training.work(on_event=listen)
    closed = Lineage(training.store).newest().manifest
    assert closed.inner is not None
    training.config = training.config.replace(rounds={"gpus_per_worker": 1})
    again: list[float] = []
    training.work(on_event=lambda event: again.append(event.loss) if isinstance(event, StepDone) else None)
    assert losses + again == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("use", "sequence_length"), [("auto", 64), (True, 16)])
def test_long_sequences_are_rolled_out_by_each_for_its_own_rows(training, tmp_path, use, sequence_length):
    """``true``: documents longer than a sequence are rows by themselves, which one process has alone."""
    training.config = training.config.replace(
        data={"batch_size": 3, "sequence_length": sequence_length},
        rollout={"chunk_size": 8 if use is True else 16, "use_chunked_training": use},
    )
    root = training.store
    expected, _ = losses_and_weights(training, tmp_path, "alone")
    training.store = root
    losses, _ = losses_and_weights(training, tmp_path, "ddp", gpus_per_worker=2)
    assert losses == pytest.approx(expected, rel=1e-4)


def test_with_parts_long_sequences_are_trained_whole_unless_something_else_is_asked_for(training, tmp_path):
    training.config = training.config.replace(
        data={"batch_size": 3, "sequence_length": 64},
        rollout={"chunk_size": 16, "use_chunked_training": False},
    )
    root = training.store
    expected, _ = losses_and_weights(training, tmp_path, "alone")
    training.store = root
    training.config = training.config.replace(rollout={"chunk_size": 16, "use_chunked_training": "auto"})
    losses, _ = losses_and_weights(training, tmp_path, "fsdp", gpus_per_worker=2, parallel="fsdp")
    assert losses == pytest.approx(expected, rel=1e-4)


def test_a_process_that_dies_ends_the_worker_with_its_name_and_none_outlives_it(training, started):
    def kill(event):
        if isinstance(event, StepDone) and event.step == 3:
            os.kill(started[0][0].pid, signal.SIGKILL)

    training.start(rounds={"gpus_per_worker": 2})
    with pytest.raises(TrainingIncomplete, match="process 1 of the 2 of this worker has ended"):
        training.work(on_event=kill)
    # What was committed is kept, and the next attempt goes on.
    training.work()
    assert Lineage(training.store).newest().manifest.final
    assert [process.returncode for process, _ in started] == [-signal.SIGKILL, 0]


@pytest.fixture
def started(monkeypatch):
    """The followers that are started, first to last, with the leader's ends of their pipes."""
    followers = []
    start = team._start

    def remember(rank, facts):
        followers.append(start(rank, facts))
        return followers[-1]

    monkeypatch.setattr(team, "_start", remember)
    return followers


def test_a_signal_to_all_processes_of_a_task_is_the_leader_s_to_answer(training, started):
    """As `timeout`, Slurm and systemd send it: the claim in hand is finished, and counts as no failure."""
    stop = threading.Event()

    def signal_all(event):
        if isinstance(event, StepDone) and event.step == 3:
            os.kill(started[0][0].pid, signal.SIGTERM)
            stop.set()

    training.start(rounds={"gpus_per_worker": 2, "seconds": 60.0})
    with pytest.raises(TrainingIncomplete, match="it was told to stop"):
        training.work(on_event=signal_all, stop=stop)
    lineage = Lineage(training.store)
    (attempt,) = lineage.published(0)
    delta, _ = lineage.delta(0, attempt)
    assert (delta.positions, delta.failed, delta.released) == ([(0, 2)], [], [])


def test_what_would_wait_for_ever_for_a_lost_process_is_broken_off(training, started, monkeypatch):
    """NCCL's exchanges do, while gloo sees a connection break. What they leave behind is not trained on."""
    broken = threading.Event()
    monkeypatch.setattr(team, "_break_off", broken.set)
    monkeypatch.setattr(team, "SEEN_SECONDS", 0.1)
    add_up, lost = Replicas.sum, []

    def wait_in_vain(self, value):
        total = add_up(self, value)
        if len(lost) < 3:
            lost.append(total)
        elif not broken.is_set():
            started[0][0].kill()
            assert broken.wait(60)
        return total

    monkeypatch.setattr(Replicas, "sum", wait_in_vain)
    steps: list[StepDone] = []
    training.start(rounds={"gpus_per_worker": 2})
    with pytest.raises(TrainingIncomplete, match="process 1 of the 2 of this worker has ended"):
        training.work(on_event=lambda event: steps.append(event) if isinstance(event, StepDone) else None)
    assert len(steps) == 3


def test_all_leave_the_group_together(training, started, monkeypatch):
    """As NCCL asks for: the end of a group returns in no process before all have called it."""
    leave = dist.destroy_process_group

    def leave_together():
        leave()
        assert started[0][0].wait(60) == 0

    monkeypatch.setattr(dist, "destroy_process_group", leave_together)
    training.start(rounds={"gpus_per_worker": 2, "max_tokens": 300})
    training.work()


def test_nobody_waits_for_nccl_after_an_error(monkeypatch, tmp_path):
    left = []
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: left.append("left"))
    replicas = Replicas(rank=0, size=2, parallel="ddp", device=torch.device("cuda", 0))
    with pytest.raises(ZeroDivisionError), team.joined(replicas, tmp_path / "meeting"):
        raise ZeroDivisionError
    assert not left
    with team.joined(replicas, tmp_path / "meeting", let_go=lambda: left.append("let go")):
        pass
    assert left == ["let go", "left"]


def test_no_process_outlives_its_killed_leader(training):
    """The leader is gone before they met, when no connection breaks."""
    training.config = training.config.replace(rounds={"gpus_per_worker": 2})
    facts = {
        "model_dir": str(training.model_dir),
        "config": training.config.model_dump(mode="json"),
        "device": "cpu",
        "meeting": str(training.model_dir / "nobody-comes"),
        "threads": 1,
        "rank": 1,
    }
    code = (
        "import json, os, sys\n"
        "from metaflow_hf.train import team\n"
        "facts = {**json.loads(sys.argv[1]), 'leader': os.getpid()}\n"
        "process, pipe = team._start(1, facts)\n"
        "assert pipe.poll(60) and pipe.recv() == team.READY\n"
        "print(process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, json.dumps(facts)], stdout=subprocess.PIPE, text=True)
    follower = Path("/proc", done.stdout.strip())
    deadline = time.monotonic() + 60
    while follower.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not follower.exists()


def test_a_process_that_cannot_start_says_why(training, monkeypatch):
    start = team._start
    monkeypatch.setattr(team, "_start", lambda rank, facts: start(rank, {**facts, "config": {"modle": {}}}))
    training.start(rounds={"gpus_per_worker": 2})
    with pytest.raises(
        TrainingIncomplete, match=r"(?s)process 1 of the 2 .* ended: ConfigError: .*did you mean 'model'"
    ):
        training.work()


def test_what_needs_all_weights_in_one_place_is_refused_with_parts(training):
    training.config = training.config.replace(
        optimizer={"name": "adamw_8bit"}, model={"compile": True}, rollout={"use_chunked_training": True}
    )
    training.start(rounds={"gpus_per_worker": 2, "parallel": "fsdp"})
    refused = "optimizer.name: adamw_8bit, model.compile: true, rollout.use_chunked_training: true"
    with pytest.raises(ConfigError, match=f"cannot be used with {refused}"):
        training.work()


def test_a_model_of_which_each_holds_a_part_is_not_moved_to_the_device_whole(training, monkeypatch):
    """It may not fit there: `fully_shard` moves layer by layer. The device is torch's meta device, for want of a GPU."""
    seen: list[set[str]] = []

    def wrap(self, model):
        seen.append({parameter.device.type for parameter in model.parameters()})
        return model

    monkeypatch.setattr(Replicas, "wrap", wrap)
    place = torch.device("meta")
    model = load_model(training.model_dir, training.config.model)
    Engine(
        model,
        training.config,
        place,
        replicas=Replicas(rank=0, size=2, parallel="fsdp", device=place),
    )
    assert seen == [{"cpu"}]


def test_the_parts_are_those_of_layers_not_of_experts():
    def layer():
        return nn.ModuleDict(
            {"attention": nn.Linear(4, 4), "experts": nn.ModuleList(nn.Linear(4, 4) for _ in range(8))}
        )

    layers = nn.ModuleList(layer() for _ in range(2))
    assert sharding._layers(nn.Sequential(nn.Embedding(4, 4), layers)) == list(layers)


def test_a_parameter_that_no_process_used_is_left_alone(tmp_path):
    """Zeros in place of no gradient would let its weights decay, which one process alone would not do."""
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    used.grad = torch.full((3,), 2.0)
    replicas = Replicas(rank=0, size=1, parallel="ddp", device=torch.device("cpu"))
    with team.joined(replicas, tmp_path / "meeting"):
        replicas.sum_gradients([used, unused])
    assert used.grad.tolist() == [2.0, 2.0, 2.0]
    assert unused.grad is None
