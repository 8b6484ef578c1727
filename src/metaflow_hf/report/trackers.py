"""Trackers by configuration: TensorBoard, trackio, W&B and MLflow, as listeners of events.

A tracker opened with the name of an earlier run goes on with that run: the horizontal axis is the tokens of
the lineage, which a restarted worker takes up where the model stands, and not a count of its own. Each package
is imported when its tracker is opened; what is not installed is one clear error.
"""

import logging
import math
import re
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from metaflow_hf.errors import ConfigError
from metaflow_hf.events import Evaluated, Event, RoundClosed, StepDone

_LOG = logging.getLogger("metaflow_hf.report")
_RUN_TAG = "metaflow_hf.run"

# (figures, tokens of the lineage when they were measured)
_Log = Callable[[dict[str, float], int], None]


class Tracker:
    """A listener that records the figures of events in one run of a tracker; ``close`` ends the session.

    Use as a context manager, so that a run that fails is closed as well. Figures that are not finite are left
    out, because the trackers' own formats disagree on them.
    """

    def __init__(self, log: _Log, close: Callable[[], None]) -> None:
        self._log = log
        self._close = close
        self._tokens = 0

    def __call__(self, event: Event) -> None:
        if isinstance(event, StepDone | RoundClosed):
            self._tokens = event.tokens_total
        values = {name: value for name, value in figures(event).items() if math.isfinite(value)}
        if values:
            self._log(values, self._tokens)

    def close(self) -> None:
        """Hands everything over to the tracker and ends the session, not the run."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def figures(event: Event) -> dict[str, float]:
    """What a tracker records of an event: name -> value; empty for events without figures."""
    match event:
        case StepDone():
            values: dict[str, float] = {"train/loss": event.loss, "train/learning_rate": event.learning_rate}
            if event.seconds > 0:
                values["train/tokens_per_second"] = event.tokens / event.seconds
            if event.memory_bytes:
                values["train/memory_gib"] = event.memory_bytes / 2**30
            return values
        case RoundClosed():
            values = {
                "round/number": event.round,
                "round/contributors": event.contributors,
                "round/waited_seconds": event.waited_seconds,
                "round/seconds": event.seconds,
            }
            return values if event.loss is None else values | {"round/loss": event.loss}
        case Evaluated():
            return {
                f"evaluation/{event.name}/loss": event.loss,
                f"evaluation/{event.name}/perplexity": event.perplexity,
                f"evaluation/{event.name}/bits_per_byte": event.bits_per_byte,
            }
        case _:
            return {}


def open_tracker(
    kind: str,
    *,
    run: str,
    directory: str | Path,
    project: str = "metaflow-hf",
    config: Mapping[str, Any] | None = None,
) -> Tracker:
    """A tracker of this kind (``tensorboard``, ``trackio``, ``wandb``, ``mlflow``) for the run of this name.

    The same ``project`` and ``run`` go on with the same run, from any process; several workers of a lineage
    take one run each (``<lineage>-<worker>``). ``directory`` holds what the tracker keeps on disk
    (trackio has its own place, ``TRACKIO_DIR``). Addresses and keys are the tracker's own settings in the
    environment. ``config`` is shown beside the run.

    Raises ``ConfigError`` for another kind, or when its package is not installed.
    """
    if kind not in _OPENERS:
        raise ConfigError(
            f"report.trackers: {kind!r} is none of {', '.join(sorted(_OPENERS))}. Use one of them."
        )
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", run).strip("-.") or "run"
    return _OPENERS[kind](project, name, Path(directory), dict(config or {}))


def _package(module: str, extra: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise
        raise ConfigError(
            f"report.trackers: {extra} is not installed. Install it by `pip install 'metaflow-hf[{extra}]'`, or "
            f"take {extra!r} out of the configuration."
        ) from error


def _tensorboard(_project: str, run: str, directory: Path, config: dict[str, Any]) -> Tracker:
    writers = _package("tensorboard.summary.writer.event_file_writer", "tensorboard")
    events = import_module("tensorboard.compat.proto.event_pb2")
    summaries = import_module("tensorboard.compat.proto.summary_pb2")
    writer = writers.EventFileWriter(str(directory / run))
    started = False

    def log(values: dict[str, float], tokens: int) -> None:
        nonlocal started
        if not started:
            # What an earlier session wrote at and after this point is not in the model: TensorBoard drops it.
            session = events.SessionLog(status=events.SessionLog.START)
            writer.add_event(events.Event(step=tokens, session_log=session))
            started = True
        summary = summaries.Summary(
            value=[summaries.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        )
        writer.add_event(events.Event(step=tokens, summary=summary))

    if config:
        _LOG.debug("tensorboard shows no configuration; it is in metrics.jsonl and on the card")
    return Tracker(log, writer.close)


def _wandb(project: str, run: str, directory: Path, config: dict[str, Any]) -> Tracker:
    wandb = _package("wandb", "wandb")
    directory.mkdir(parents=True, exist_ok=True)
    session = wandb.init(
        project=project,
        id=run,
        name=run,
        resume="allow",
        dir=str(directory),
        config=config,
        reinit="create_new",
    )
    # Its own step must never go back, the tokens of a lineage may after lost work.
    session.define_metric("tokens")
    session.define_metric("*", step_metric="tokens")
    return Tracker(lambda values, tokens: session.log({**values, "tokens": tokens}), session.finish)


def _mlflow(project: str, run: str, directory: Path, config: dict[str, Any]) -> Tracker:
    mlflow = _package("mlflow", "mlflow")
    address = None  # what the user configured for MLflow itself goes first
    if not mlflow.tracking.is_tracking_uri_set():
        _package("sqlalchemy", "mlflow")
        directory.mkdir(parents=True, exist_ok=True)
        address = f"sqlite:///{directory.absolute()}/mlflow.db"
    client = mlflow.MlflowClient(tracking_uri=address)
    experiment = client.get_experiment_by_name(project)
    experiment_id = experiment.experiment_id if experiment else client.create_experiment(project)
    earlier = client.search_runs([experiment_id], f"tags.`{_RUN_TAG}` = '{run}'", max_results=1)
    if earlier:
        run_id = earlier[0].info.run_id
        client.update_run(run_id, status="RUNNING")
    else:
        run_id = client.create_run(experiment_id, run_name=run, tags={_RUN_TAG: run}).info.run_id
        for key, value in config.items():
            client.log_param(run_id, key, value)

    def log(values: dict[str, float], tokens: int) -> None:
        for name, value in values.items():
            client.log_metric(run_id, name, value, step=tokens)

    return Tracker(log, lambda: client.set_terminated(run_id))


def _trackio(project: str, run: str, _directory: Path, config: dict[str, Any]) -> Tracker:
    trackio = _package("trackio", "trackio")
    session = trackio.init(
        project=project,
        name=run,
        resume="allow",
        config=config,
        embed=False,
        auto_log_cpu=False,
        auto_log_gpu=False,
    )
    return Tracker(lambda values, tokens: session.log(values, step=tokens), session.finish)


_OPENERS: dict[str, Callable[[str, str, Path, dict[str, Any]], Tracker]] = {
    "mlflow": _mlflow,
    "tensorboard": _tensorboard,
    "trackio": _trackio,
    "wandb": _wandb,
}
