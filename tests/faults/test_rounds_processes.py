"""Real processes that are killed, stopped and told to end; checked from the store's content alone."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from metaflow_hf.config import TrainConfig
from metaflow_hf.data import BlockManager, process_raw_dataset_to_blocks
from metaflow_hf.demo import tiny_models, tiny_tokenizers
from metaflow_hf.store import open_store
from metaflow_hf.train import start_lineage

CONFIG = {
    "data": {
        "heldout_samples": 1,
        "sequence_length": 32,
        "batch_size": 4,
        "seed": 3,
        "dataset_chunk_size": 20,
    },
    "rounds": {"workers": 3, "claim_samples": 5, "seconds": 0.2, "keep": "all"},
}
# Forked from a server that has the heavy imports done, so that a worker starts at once.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["metaflow_hf.train.running", "transformers.models.llama.modeling_llama"])
WORKER = """
import os, signal, threading, time
import torch
torch.set_num_threads(1)
from metaflow_hf.config import TrainConfig
from metaflow_hf.data import BlockManager
from metaflow_hf.store import open_store
from metaflow_hf.train import train_worker
from metaflow_hf.train.heartbeat import Patience

if as_child:
    child = os.fork()
    if child:
        log.with_suffix(".pid").write_text(str(child))
        time.sleep(100)
stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stop.set())

def on_event(event):
    with log.open("a") as file:
        file.write(type(event).__name__ + chr(10))

train_worker(
    store=open_store(root / "store"),
    blocks=BlockManager(root / "blocks", dataset_chunk_size=20),
    model_dir=root / "model",
    config=TrainConfig.parse(config),
    lineage="test",
    stop=stop,
    patience=Patience(minimum=minimum, first_step=minimum, interval=0.1),
    on_event=on_event,
)
"""


class WorkerProcess:
    """One worker, and what it said."""

    def __init__(self, root: Path, number: int, *, minimum: float, as_child: bool) -> None:
        self.log = root / f"worker{number}.log"
        names = {
            "root": root,
            "log": self.log,
            "config": CONFIG,
            "minimum": minimum,
            "as_child": as_child,
        }
        self.process = PROCESSES.Process(target=exec, args=(WORKER, names))
        self.process.start()

    @property
    def events(self) -> list[str]:
        return self.log.read_text().split() if self.log.exists() else []

    def send(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def await_claims(self, count: int) -> None:
        """Until it has finished so many claims: the next is in its hand then."""
        wait_until(lambda: self.events.count("ClaimDone") >= count, "no claim is finished")

    def end(self) -> int:
        self.process.join(100)
        return self.process.exitcode


@pytest.fixture
def root(tmp_path) -> Path:
    texts = [f"row {number} of the file " + "with some more words " * (number % 9) for number in range(1001)]
    (tmp_path / "raw.txt").write_text("\n".join(texts) + "\n", "utf-8")
    process_raw_dataset_to_blocks(tmp_path / "raw.txt", tmp_path / "blocks", "rows", block_size=400)
    config = tiny_models.llama_config(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2, num_kv_heads=1
    )
    model = tmp_path / "model"
    model.mkdir()
    for name, data in {
        "config.json": tiny_models.config_file(config),
        "model.safetensors": tiny_models.safetensors_file(tiny_models.llama_weights(config, 1)),
        **tiny_tokenizers.byte_level_bpe(texts[:50], 300),
        **tiny_tokenizers.bpe_config(2048),
    }.items():
        (model / name).write_bytes(data)
    start_lineage(
        store=open_store(tmp_path / "store"),
        blocks=BlockManager(tmp_path / "blocks", dataset_chunk_size=20),
        model_dir=model,
        config=TrainConfig.parse(CONFIG),
        lineage="test",
    )
    return tmp_path


@pytest.fixture
def workers(root):
    """Starts worker processes, and makes sure that none outlives the test."""
    started: list[WorkerProcess] = []

    def start(count: int, *, minimum: float = 60.0, as_child: bool = False) -> list[WorkerProcess]:
        for _ in range(count):
            started.append(WorkerProcess(root, len(started), minimum=minimum, as_child=as_child))
        return started[-count:]

    yield start
    for worker in started:
        worker.process.kill()
        worker.process.join()


def wait_until(condition, message: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, message
        time.sleep(0.02)


def newest_round(root: Path) -> int:
    return len(list((root / "store/rounds").glob("*.json"))) - 1


def wait_for_round(root: Path, number: int) -> None:
    wait_until(lambda: newest_round(root) >= number, f"round {number} does not come")


def assert_exactly_once(root: Path, num_positions: int = 200) -> list[dict]:
    rounds = [json.loads(path.read_text()) for path in sorted((root / "store/rounds").glob("*.json"))]
    seen = [
        position
        for manifest in rounds
        for item in manifest["accepted"]
        for start, stop in item["positions"]
        for position in range(start, stop)
    ]
    assert sorted(seen) == list(range(num_positions))
    assert rounds[-1]["final"]
    return rounds


def test_a_worker_killed_in_the_middle_costs_its_claims_of_one_round(root, workers):
    victim, *others = workers(3)
    victim.await_claims(2)
    victim.send(signal.SIGKILL)
    began = time.monotonic()
    assert [worker.end() for worker in others] == [0, 0]
    assert time.monotonic() - began < 50, "a process that is gone from this machine needs no waiting"
    assert_exactly_once(root)


def test_a_zombie_drops_its_work_and_goes_on(root, workers):
    zombie, other = workers(2, minimum=1.0)
    zombie.await_claims(3)
    zombie.send(signal.SIGSTOP)
    wait_for_round(root, newest_round(root) + 4)
    zombie.send(signal.SIGCONT)
    assert [zombie.end(), other.end()] == [0, 0]
    rounds = assert_exactly_once(root)
    assert any(manifest["failures"] for manifest in rounds) == ("WorkLost" in zombie.events)


def test_a_worker_that_is_told_to_end_publishes_and_is_not_waited_for(root, workers):
    leaver, other = workers(2)
    leaver.await_claims(2)
    leaver.send(signal.SIGTERM)
    began = time.monotonic()
    assert leaver.end() != 0
    assert other.end() == 0
    assert time.monotonic() - began < 50
    rounds = assert_exactly_once(root)
    assert not any(manifest["failures"] for manifest in rounds)


def test_all_killed_and_started_again(root, workers):
    first = workers(2)
    wait_for_round(root, 2)
    for worker in first:
        worker.send(signal.SIGKILL)
        worker.end()
    assert [worker.end() for worker in workers(2)] == [0, 0]
    assert_exactly_once(root)


def test_a_worker_notices_that_its_parent_is_gone(root, workers):
    (parent,) = workers(1, as_child=True)
    wait_for_round(root, 1)
    child = int(parent.log.with_suffix(".pid").read_text())
    parent.send(signal.SIGKILL)
    wait_until(lambda: not is_running(child), "the orphan goes on")
    assert newest_round(root) < 200
    (other,) = workers(1)
    assert other.end() == 0
    assert_exactly_once(root)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (ProcessLookupError, FileNotFoundError):
        return False
