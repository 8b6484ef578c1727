"""A worker put together from its parts, the same for a process that trains and for a scheduler that plays one."""

import random
import time
from collections.abc import Callable
from pathlib import Path

from metaflow_hf.config import RoundsConfig
from metaflow_hf.data.manager import BlockManager
from metaflow_hf.data.manifest import BlockManifest
from metaflow_hf.data.order import Order
from metaflow_hf.data.tracker import ChunkTracker
from metaflow_hf.events import OnEvent, ignore
from metaflow_hf.store.objects import new_nonce
from metaflow_hf.train.announcements import Announcer
from metaflow_hf.train.closing import Closer, Pace
from metaflow_hf.train.contribution import Publisher
from metaflow_hf.train.files import PayloadFiles
from metaflow_hf.train.heartbeat import Heartbeat, Watch
from metaflow_hf.train.ledger import RoundLimits, RoundsLedger
from metaflow_hf.train.lineage import Lineage
from metaflow_hf.train.merge import Merger
from metaflow_hf.train.outer import OuterStep, average, nesterov
from metaflow_hf.train.trainer import Trainer
from metaflow_hf.train.validation import Validator
from metaflow_hf.train.worker import Plan, Worker


def assemble_worker(
    *,
    plan: Plan,
    lineage: Lineage,
    blocks: BlockManager | BlockManifest,
    order: Order,
    trainer: Trainer,
    heartbeat: Heartbeat,
    scratch: Path,
    attempt: str,
    rounds: RoundsConfig,
    pace: Pace,
    rng: random.Random,
    on_event: OnEvent = ignore,
    stop: Callable[[], str | None] = lambda: None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    outer_step: OuterStep | None = None,
    validator: Validator | None = None,
    nonce: Callable[[], str] = new_nonce,
) -> Worker:
    """A worker of the parts given; whatever it touches outside of itself is among them."""
    files = PayloadFiles(lineage.store, scratch)
    watch = Watch(lineage.store, clock=clock)
    limits = RoundLimits(budget=plan.budget, seconds=rounds.seconds, max_failures=plan.max_failures)
    ledger = RoundsLedger(lineage, order, attempt=attempt, limits=limits, clock=clock, rng=rng, nonce=nonce)
    merger = Merger(
        lineage=lineage,
        files=files,
        attempt=attempt,
        num_positions=plan.budget.num_positions,
        max_tokens=plan.budget.max_tokens,
        outer_step=outer_step or _outer_step(rounds),
        max_failures=plan.max_failures,
        skip_failing=plan.skip_failing,
        ema_half_life=rounds.ema_half_life,
        enough=validator.enough if validator is not None else lambda: "",
        progress=heartbeat.progress,
        nonce=nonce,
    )
    return Worker(
        plan=plan,
        lineage=lineage,
        ledger=ledger,
        tracker=ChunkTracker(None, blocks, ledger=ledger, worker_id=attempt),
        trainer=trainer,
        files=files,
        publisher=Publisher(
            lineage=lineage,
            files=files,
            trainer=trainer,
            heartbeat=heartbeat,
            attempt=attempt,
            encoding="int8/1024" if rounds.encoding == "int8" else "fp32",
            clock=clock,
        ),
        closer=Closer(
            lineage=lineage,
            merger=merger,
            watch=watch,
            attempt=attempt,
            pace=pace,
            stop=stop,
            clock=clock,
            sleep=sleep,
        ),
        heartbeat=heartbeat,
        watch=watch,
        announcer=Announcer(attempt=attempt, budget=plan.budget, on_event=on_event),
        validator=validator,
        stop=stop,
        clock=clock,
    )


def _outer_step(rounds: RoundsConfig) -> OuterStep:
    if rounds.merge == "average":
        return average
    return nesterov(rounds.outer_learning_rate, rounds.outer_momentum)
