"""Who listens to a worker of a flow: its metrics file, the lines of its log, its trackers, the live page."""

import platform
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from metaflow_hf import __version__
from metaflow_hf.config import TrainConfig
from metaflow_hf.config_sources import settings_of
from metaflow_hf.events import OnEvent
from metaflow_hf.report import LivePage, MetricsFile, ProgressLines, fan_out, open_tracker, units
from metaflow_hf.report.outcome import Plan
from metaflow_hf.report.page import Page
from metaflow_hf.report.text import named_revision, plain, ruled
from metaflow_hf.store.objects import ObjectStore
from metaflow_hf.train.lineage import ClosedRound, Lineage
from metaflow_hf.train.stored_metrics import OtherWorkers

_HOST_LENGTH: Final = 24


@dataclass(frozen=True, kw_only=True)
class Listeners:
    """What a worker's events go to. ``plan`` and ``draw`` make the live page; without them there is none."""

    config: TrainConfig
    lineage: str
    store: ObjectStore
    branch: int
    attempt: str
    write: Callable[[str], None]
    plan: Plan | None = None
    draw: Callable[[Page], None] | None = None

    @contextmanager
    def open(self, metrics_path: Path) -> Iterator[OnEvent]:
        """The listener of all of them, for as long as the block lasts, after five lines that say what begins; metrics
        go to the file at ``metrics_path``.
        """
        self.write(ruled(_banner(self)))
        settings = self.config.report
        with ExitStack() as stack:
            metrics = stack.enter_context(MetricsFile(metrics_path))
            lines = ProgressLines(
                self.write,
                label=f"worker {self.branch} {short_host()}",
                interval_seconds=settings.interval_seconds,
                planned_workers=self.config.rounds.workers,
            )
            trackers = [
                stack.enter_context(
                    closing(
                        open_tracker(
                            kind,
                            run=f"{self.lineage}-{self.branch}",
                            directory=Path("trackers"),
                            config={one.path: one.value for one in settings_of(self.config, {}, where="")},
                        )
                    )
                )
                for kind in settings.trackers
            ]
            pages = []
            if self.plan is not None and self.draw is not None:
                page = LivePage(
                    self.draw,
                    self.plan,
                    # One page shows everybody; that all do would be a look at all by all.
                    others=OtherWorkers(self.store) if self.branch == 0 else lambda _: (),
                    interval_seconds=settings.card_seconds,
                )
                pages.append(stack.enter_context(closing(page)))
            yield fan_out(metrics, lines, *trackers, *pages)


def short_host() -> str:
    """The machine's name without its domain; of a long one the end, which tells pods of a workflow apart."""
    name = socket.gethostname().partition(".")[0]
    return name if len(name) <= _HOST_LENGTH else f"…{name[-_HOST_LENGTH + 1 :]}"


def _banner(listeners: Listeners) -> str:
    """Five lines that say who trains what, from where and until when."""
    import torch

    config, plan = listeners.config, listeners.plan
    rounds, optimizer = config.rounds, config.optimizer
    model = named_revision(config.model.name, plan.model_commit if plan else "")
    data = named_revision(config.data.title, plan.dataset_commit if plan else "")
    parameters = f", {units.short_count(plan.parameters)} parameters" if plan and plan.parameters else ""
    samples = f", {units.count(plan.samples)} samples" if plan and plan.samples else ""
    batches = f"batches of {config.data.batch_size} x {units.count(config.data.sequence_length)} tokens"
    limit = f"{units.count(rounds.max_tokens)} tokens, or " if rounds.max_tokens else ""
    epochs = "1 epoch of the data" if config.data.epochs == 1 else f"{config.data.epochs} epochs of the data"
    end = "the end of the mixture" if config.data.datasets else epochs
    rate = f"learning rate {units.learning_rate(optimizer.learning_rate)}, {optimizer.schedule}"
    where = f"worker {listeners.branch} of {rounds.workers} on {socket.gethostname()}"
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    compiled = ", compiled: the first steps take minutes" if config.model.compile else ""
    standing = _standing(Lineage(listeners.store).newest())
    lines = (
        f"metaflow-hf {__version__}, {where} (attempt {listeners.attempt}), {_device()}, {versions}",
        f"model    {model}{parameters}, {config.model.dtype}{', LoRA' if config.model.lora else ''}{compiled}",
        f"data     {data}{samples}; {batches}",
        f"lineage  {listeners.lineage}, {standing}; {rate}",
        f"until    {limit}{end}; rounds of {units.duration(rounds.seconds)}; if interrupted, resume",
    )
    return "\n".join(plain(line).replace("\n", " ") for line in lines)


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        facts = torch.cuda.get_device_properties(0)
        return f"{facts.name} with {units.byte_size(facts.total_memory)}"
    threads = torch.get_num_threads()
    return f"CPU with {threads} thread" + ("s" if threads != 1 else "")


def _standing(newest: ClosedRound | None) -> str:
    if newest is None or newest.number == 0:
        return "at its beginning"
    return f"after round {newest.number} ({units.count(newest.manifest.tokens)} tokens)"
