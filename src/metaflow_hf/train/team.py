"""The processes of a worker with several GPUs: this one leads, each of the others follows on a GPU of its own.

The leader is the task's own process, so that claims, rounds, signals and reports are what they are with one GPU. It
tells the followers by pipes what is done next (a method of ``Engine`` and its arguments) and does the same; gradients
and parts of weights go through torch.distributed: NCCL between GPUs, gloo between processes on a CPU. A follower ends
with its pipe, however the leader ends.

What all do together ends for none of them before all have done it, so NCCL lets nobody know that a process is gone. A
thread of the leader does: it sees the end of a follower's pipe.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from datetime import timedelta
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist

from metaflow_hf.config import TrainConfig
from metaflow_hf.errors import ConfigError, TrainingIncomplete
from metaflow_hf.train.devices import check_parallel
from metaflow_hf.train.engine import Engine
from metaflow_hf.train.messages import encode_call, next_call
from metaflow_hf.train.models import load_trainable
from metaflow_hf.train.sharding import Replicas

logger = logging.getLogger("metaflow_hf.train")

READY: Final = "ready"
# A pass of the slowest step; a process that is silent for longer is given up.
TIMEOUT: Final = timedelta(minutes=30)
# How long the leader may take to see by itself that a follower is gone, and to come back once the group was broken off.
SEEN_SECONDS: Final = 20.0
BACK_SECONDS: Final = 300.0
# In which followers end by themselves.
FAREWELL_SECONDS: Final = 10.0


class Team:
    """The leader's side. ``together`` is for what all do; see ``open_team``."""

    def __init__(
        self, replicas: Replicas, followers: list[tuple[subprocess.Popen[bytes], Connection]]
    ) -> None:
        self.replicas = replicas
        self._followers = followers
        self._lost: TrainingIncomplete | None = None
        self._noticed = threading.Event()
        # Set while this process does nothing together with the others.
        self._apart = threading.Event()
        self._apart.set()
        self._bell = Pipe(duplex=False)
        self._watching: threading.Thread | None = None

    @contextmanager
    def together(self, method: str | None = None, *arguments: Any) -> Iterator[None]:
        """In the block this process does what the followers do: ``method`` of their engines, or what they do unasked.

        Raises ``TrainingIncomplete`` when one of them has ended, whatever came of that in the block.
        """
        self._refuse_loss()
        self._apart.clear()
        try:
            if method is not None:
                message = encode_call(method, arguments)
                for _, pipe in self._followers:
                    pipe.send_bytes(message)
            yield
        except (RuntimeError, OSError, ValueError) as error:
            # torch.distributed says that a connection was lost, not why; who was lost is noticed a moment later.
            if self._noticed.wait(1.0) and self._lost is not None:
                raise self._lost from error
            raise
        finally:
            self._apart.set()
        # What a broken exchange left behind is nothing that may be used.
        self._refuse_loss()

    def _refuse_loss(self) -> None:
        if self._lost is not None:
            raise self._lost

    def await_start(self) -> None:
        """Returns when all are about to join. Raises ``TrainingIncomplete`` when one ends before."""
        for rank, (process, pipe) in enumerate(self._followers, start=1):
            while not pipe.poll(1.0) and process.poll() is None:
                pass
            words = _hear(pipe)
            if words != READY:
                raise self._ended(rank, words)

    def watch(self) -> None:
        """From now on the end of a follower is noticed at once, and never waited for in vain."""
        thread = threading.Thread(target=self._watch, args=(self._bell[0],), name="team", daemon=True)
        thread.start()
        self._watching = thread

    def _watch(self, bell: Connection) -> None:
        pipes = [pipe for _, pipe in self._followers]
        ready = wait([bell, *pipes])
        if bell in ready:
            return
        rank, pipe = next((number, pipe) for number, pipe in enumerate(pipes, start=1) if pipe in ready)
        self._lost = self._ended(rank, _hear(pipe))
        self._noticed.set()
        logger.error("%s", self._lost)
        if self._apart.wait(SEEN_SECONDS):
            return
        threading.Thread(target=_break_off, name="break-off", daemon=True).start()
        if not self._apart.wait(BACK_SECONDS):
            logger.critical("this process waits for one that is gone, and ends.")
            logging.shutdown()
            os._exit(1)

    def _ended(self, rank: int, words: str | None) -> TrainingIncomplete:
        reason = f": {words}" if words else " without a word"
        return TrainingIncomplete(
            f"process {rank} of the {self.replicas.size} of this worker has ended{reason}. Retry: what was committed is kept."
        )

    def let_go(self) -> None:
        """Tells the followers that this was all, and watches them no longer; idempotent."""
        self._apart.set()
        self._bell[1].close()
        if self._watching is not None:
            self._watching.join()
        self._bell[0].close()
        for _, pipe in self._followers:
            pipe.close()

    def close(self) -> None:
        """Lets the followers go, and waits for them."""
        self.let_go()
        until = time.monotonic() + FAREWELL_SECONDS
        for process, _ in self._followers:
            try:
                process.wait(timeout=max(until - time.monotonic(), 0.1))
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
        replicas = Replicas(
            rank=0, size=size, parallel=config.rounds.parallel, device=_device(device.type, 0)
        )
        _take(replicas.device)
        followers = [_start(rank, {**facts, "rank": rank}) for rank in range(1, size)]
        team = Team(replicas, followers)
        stack.enter_context(closing(team))
        team.await_start()
        team.watch()
        with team.together():
            stack.enter_context(joined(replicas, scratch / "meeting", let_go=team.let_go))
        yield team


@contextmanager
def joined(replicas: Replicas, meeting: Path, *, let_go: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Puts this process into the group of a worker's processes, which meet at a file.

    All have to leave it at once: ``let_go`` tells the others to do so.
    """
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
    except BaseException:
        # NCCL would wait for processes that are gone, or wait for this one in the middle of a step.
        if backend == "gloo":
            dist.destroy_process_group()
        raise
    let_go()
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
    _take(device)
    pipe.send(READY)
    with joined(replicas, Path(facts["meeting"])):
        model = load_trainable(Path(facts["model_dir"]), config, device)
        engine = Engine(model, config, device, replicas=replicas)
        while (call := next_call(pipe)) is not None:
            method, arguments = call
            getattr(engine, method)(*arguments)


def _take(device: torch.device) -> None:
    """Makes a GPU this process's own; one that cannot be used is found out here."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)


def _break_off() -> None:
    """Ends what waits for a process that is gone."""
    if dist.is_initialized():
        dist.distributed_c10d._abort_process_group()  # noqa: SLF001  there is no public way


def _hear(pipe: Connection) -> str:
    try:
        return str(pipe.recv())
    except (EOFError, OSError):
        return ""


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
