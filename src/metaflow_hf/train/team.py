"""The processes of a worker with several GPUs: this one leads, each of the others follows on a GPU of its own.

The leader is the task's own process, so that claims, rounds, signals and reports are what they are with one GPU. It
tells the followers by pipes what is done next (a method of ``Engine`` and its arguments) and does the same; gradients
and parts of weights go through torch.distributed: NCCL between GPUs, gloo between processes on a CPU. A follower ends
with its pipe, however the leader ends.
"""

import dataclasses
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from datetime import timedelta
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import msgspec
import torch
import torch.distributed as dist

from metaflow_hf.config import TrainConfig
from metaflow_hf.data.batches import Batch
from metaflow_hf.errors import ConfigError, TrainingIncomplete
from metaflow_hf.train.devices import check_parallel
from metaflow_hf.train.engine import Engine
from metaflow_hf.train.models import load_trainable
from metaflow_hf.train.sharding import Replicas

logger = logging.getLogger("metaflow_hf.train")

READY: Final = "ready"
# A pass of the slowest step; a process that is silent for longer is given up.
TIMEOUT: Final = timedelta(minutes=30)


class Team:
    """The leader's side. ``tell`` is for what all do, before the leader does it; see ``open_team``."""

    def __init__(
        self, replicas: Replicas, followers: list[tuple[subprocess.Popen[bytes], Connection]]
    ) -> None:
        self.replicas = replicas
        self._followers = followers

    def tell(self, method: str, *arguments: Any) -> None:
        """Makes every follower call ``method`` of its engine. Raises ``TrainingIncomplete`` when one has ended."""
        message = msgspec.msgpack.encode((method, [_plain(value) for value in arguments]))
        for _, pipe in self._followers:
            try:
                pipe.send_bytes(message)
            except OSError as error:
                raise self.lost() or TrainingIncomplete("a process of this worker has ended.") from error

    def await_start(self) -> None:
        """Returns when all are about to join. Raises ``TrainingIncomplete`` when one ends before."""
        for rank, (process, pipe) in enumerate(self._followers, start=1):
            while not pipe.poll(1.0) and process.poll() is None:
                pass
            words = self._hear(pipe)
            if words != READY:
                raise self._ended(rank, words)

    @staticmethod
    def _hear(pipe: Connection) -> str:
        try:
            return str(pipe.recv())
        except (EOFError, OSError):
            return ""

    def lost(self) -> TrainingIncomplete | None:
        """Which follower has ended and why, if one has."""
        for rank, (process, pipe) in enumerate(self._followers, start=1):
            words = self._hear(pipe) if pipe.poll(0.5) else None
            if words is not None or process.poll() is not None:
                return self._ended(rank, words)
        return None

    def _ended(self, rank: int, words: str | None) -> TrainingIncomplete:
        reason = f": {words}" if words else " without a word"
        return TrainingIncomplete(
            f"process {rank} of the {self.replicas.size} of this worker has ended{reason}. Retry: what was committed is kept."
        )

    def close(self) -> None:
        """Lets the followers go, and waits for them."""
        for _, pipe in self._followers:
            pipe.close()
        for process, _ in self._followers:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def open_team(model_dir: Path, config: TrainConfig, device: torch.device) -> Iterator[Team | None]:
    """The other processes of this worker, or ``None`` where it has one GPU; they end with the block.

    Raises ``ConfigError`` when there are fewer GPUs than ``rounds.gpus_per_worker``.
    """
    size = config.rounds.gpus_per_worker
    if size == 1:
        yield None
        return
    check_parallel(config)
    if device.type == "cuda" and torch.cuda.device_count() < size:
        raise ConfigError(
            f"rounds.gpus_per_worker = {size}, but this worker sees {torch.cuda.device_count()} GPUs: ask for more "
            "(@resources(gpu=…)), or lower it."
        )
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="team-")))
        facts = {
            "model_dir": str(model_dir),
            "config": config.model_dump(mode="json"),
            "device": device.type,
            "meeting": str(scratch / "meeting"),
            "threads": torch.get_num_threads(),
            "leader": os.getpid(),
        }
        followers = [_start(rank, {**facts, "rank": rank}) for rank in range(1, size)]
        replicas = Replicas(
            rank=0, size=size, parallel=config.rounds.parallel, device=_device(device.type, 0)
        )
        team = Team(replicas, followers)
        stack.enter_context(closing(team))
        team.await_start()
        try:
            with joined(replicas, scratch / "meeting"):
                yield team
        except RuntimeError as error:
            # torch.distributed says that a connection was lost, not why.
            if (lost := team.lost()) is not None:
                raise lost from error
            raise


@contextmanager
def joined(replicas: Replicas, meeting: Path) -> Iterator[None]:
    """Puts this process into the group of a worker's processes, which meet at a file."""
    if replicas.device.type == "cuda":
        torch.cuda.set_device(replicas.device)
    backend = "nccl" if replicas.device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        init_method=f"file://{meeting}",
        rank=replicas.rank,
        world_size=replicas.size,
        timeout=TIMEOUT,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def follow(facts: dict[str, Any], pipe: Connection) -> None:
    """A follower: does what it is told until the leader is gone."""
    config = TrainConfig.parse(facts["config"])
    rank = int(facts["rank"])
    device = _device(facts["device"], rank)
    torch.set_num_threads(int(facts["threads"]))
    replicas = Replicas(
        rank=rank, size=config.rounds.gpus_per_worker, parallel=config.rounds.parallel, device=device
    )
    pipe.send(READY)
    with joined(replicas, Path(facts["meeting"])):
        model = load_trainable(Path(facts["model_dir"]), config, device)
        engine = Engine(model, config, device, replicas=replicas)
        while (message := _next(pipe)) is not None:
            method, arguments = message
            getattr(engine, method)(*arguments)


def _next(pipe: Connection) -> tuple[str, tuple[Any, ...]] | None:
    try:
        method, arguments = msgspec.msgpack.decode(pipe.recv_bytes())
    except EOFError:
        return None
    return method, tuple(map(_restored, arguments))


def _plain(value: Any) -> Any:
    """An argument as msgpack has it: tensors as lists, batches and paths by their names."""
    if isinstance(value, Batch):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {"batch": {name: _plain(item) for name, item in fields.items()}}
    if isinstance(value, torch.Tensor):
        return {"tensor": value.tolist()}
    if isinstance(value, Path):
        return {"path": str(value)}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _restored(value: Any) -> Any:
    if isinstance(value, list):
        return [_restored(item) for item in value]
    match value:
        case {"batch": fields}:
            return Batch(**{name: _restored(item) for name, item in fields.items()})
        case {"tensor": items}:
            return torch.tensor(items, dtype=torch.long)
        case {"path": text}:
            return Path(text)
    return value


def _start(rank: int, facts: dict[str, Any]) -> tuple[subprocess.Popen[bytes], Connection]:
    ours, theirs = Pipe()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "metaflow_hf.train.follower", str(theirs.fileno()), json.dumps(facts)],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
    logger.info("process %d of this worker has pid %d", rank, process.pid)
    return process, ours


def _device(kind: str, rank: int) -> torch.device:
    return torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
