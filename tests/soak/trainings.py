"""A small training by real processes: made on the spot, started as often as wanted, on any store."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metaflow_hf.config import TrainConfig
from metaflow_hf.data import BlockManager, process_raw_dataset_to_blocks
from metaflow_hf.demo import tiny_models, tiny_tokenizers
from metaflow_hf.store import open_store
from metaflow_hf.train import start_lineage

CHUNK = 20
NUM_POSITIONS = 300
CONFIG: Mapping[str, Any] = {
    "data": {
        "heldout_samples": 1,
        "sequence_length": 32,
        "batch_size": 4,
        "seed": 3,
        "dataset_chunk_size": CHUNK,
    },
    # Nobody is killed so often in earnest that one position is lost five times; here that ends no training.
    "rounds": {"workers": 3, "claim_samples": 5, "seconds": 0.2, "keep": "all", "max_failures": 1_000},
}
# Forked from a server that has the heavy imports done, so that a worker starts at once.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["metaflow_hf.train.running", "transformers.models.llama.modeling_llama"])
WORKER = """
import os, signal, threading, time
os.environ.update(environment)
# What goes wrong in a worker that is hurt is expected, and of interest only when the lineage is wrong.
errors = open(log.with_suffix(".err"), "w")
os.dup2(errors.fileno(), 2)
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
    store=open_store(store),
    blocks=BlockManager(root / "blocks", dataset_chunk_size=chunk),
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

    def __init__(self, training: "Training", number: int, *, minimum: float, as_child: bool) -> None:
        self.log = training.root / f"worker{number}.log"
        names = {
            "root": training.root,
            "store": training.store,
            "chunk": CHUNK,
            "log": self.log,
            "config": training.config,
            "environment": dict(training.environment),
            "minimum": minimum,
            "as_child": as_child,
        }
        self.process = PROCESSES.Process(target=exec, args=(WORKER, names))
        self.process.start()

    @property
    def events(self) -> list[str]:
        return self.log.read_text().split() if self.log.exists() else []

    @property
    def last_words(self) -> str:
        """The last line of its stderr."""
        errors = self.log.with_suffix(".err")
        lines = errors.read_text().splitlines() if errors.exists() else []
        return lines[-1] if lines else "nothing"

    def await_claims(self, count: int) -> None:
        """Until it has finished so many claims: the next is in its hand then."""
        wait_until(lambda: self.events.count("ClaimDone") >= count, "no claim is finished")

    @property
    def has_ended(self) -> bool:
        return self.process.exitcode is not None

    def send(self, number: signal.Signals) -> None:
        """A signal, unless the process has ended."""
        if not self.has_ended:
            os.kill(self.process.pid, number)

    def end(self, patience_seconds: float = 100) -> int | None:
        """Waits for the end; its exit code."""
        self.process.join(patience_seconds)
        return self.process.exitcode


@dataclass(kw_only=True)
class Training:
    """Blocks and a model below ``root``, a lineage in ``store``, and the workers that were started."""

    root: Path
    store: str
    config: Mapping[str, Any] = field(default_factory=lambda: dict(CONFIG))
    environment: Mapping[str, str] = field(default_factory=dict)
    workers: list[WorkerProcess] = field(default_factory=list)

    def prepare(self) -> None:
        """Makes dataset and model, and starts the lineage."""
        self.root.mkdir(parents=True, exist_ok=True)
        texts = [
            f"row {number} of the file " + "with some more words " * (number % 9)
            for number in range(NUM_POSITIONS * 5)
        ]
        raw = self.root / "raw.txt"
        raw.write_text("\n".join(texts) + "\n", "utf-8")
        process_raw_dataset_to_blocks(raw, self.root / "blocks", "rows", block_size=400)
        llama = tiny_models.llama_config(
            vocab_size=300, hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2, num_kv_heads=1
        )
        model = self.root / "model"
        model.mkdir()
        for name, data in {
            "config.json": tiny_models.config_file(llama),
            "model.safetensors": tiny_models.safetensors_file(tiny_models.llama_weights(llama, 1)),
            **tiny_tokenizers.byte_level_bpe(texts[:50], 300),
            **tiny_tokenizers.bpe_config(2048),
        }.items():
            (model / name).write_bytes(data)
        start_lineage(
            store=open_store(self.store),
            blocks=BlockManager(self.root / "blocks", dataset_chunk_size=CHUNK),
            model_dir=model,
            config=TrainConfig.parse(self.config),
            lineage="test",
        )

    def start(self, count: int, *, minimum: float = 60.0, as_child: bool = False) -> list[WorkerProcess]:
        """Starts workers that may be silent for ``minimum`` seconds before others give them up."""
        for _ in range(count):
            number = len(self.workers)
            self.workers.append(WorkerProcess(self, number, minimum=minimum, as_child=as_child))
        return self.workers[-count:]

    def kill_all(self) -> None:
        """Makes sure that no process outlives the training."""
        for worker in self.workers:
            worker.process.kill()
            worker.process.join()


def wait_until(condition: Callable[[], bool], message: str) -> None:
    """Looks until it is so; fails with the message after a minute."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, message
        time.sleep(0.02)
