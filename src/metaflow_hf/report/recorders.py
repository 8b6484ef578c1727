"""The packages of trackers: TensorBoard, trackio, W&B and MLflow, each as a session that records points.

A session opened with the name of an earlier run goes on with that run. Each function imports its package, and
returns what opens the session, which may ask a server and fail.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

from metaflow_hf.errors import ConfigError

_LOG = logging.getLogger("metaflow_hf.report")
_RUN_TAG: Final = "metaflow_hf.run"
# What MLflow takes in one request.
_MOST_PARAMS: Final = 100


class Point(NamedTuple):
    """Figures by name, the tokens of the lineage when they were measured, and the time in seconds since the epoch."""

    values: dict[str, float]
    tokens: int
    time: float


class Recorder(Protocol):
    """A session of a tracker. Both methods may wait for a server, and raise whatever the package raises."""

    def record(self, points: Sequence[Point]) -> None:
        """Records them, in order; points that were recorded before are recorded again or left as they are."""

    def close(self) -> None:
        """Hands everything over and ends the session, not the run."""


Connect = Callable[[], Recorder]


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


class _Calls:
    """A session that takes one point a call."""

    def __init__(self, record: Callable[[Point], object], close: Callable[[], object]) -> None:
        self._record = record
        self._close = close

    def record(self, points: Sequence[Point]) -> None:
        for point in points:
            self._record(point)

    def close(self) -> None:
        self._close()


def _tensorboard(_project: str, run: str, directory: Path, config: Mapping[str, Any]) -> Connect:
    writers = _package("tensorboard.summary.writer.event_file_writer", "tensorboard")
    events = import_module("tensorboard.compat.proto.event_pb2")
    summaries = import_module("tensorboard.compat.proto.summary_pb2")
    if config:
        _LOG.debug("tensorboard shows no configuration; it is in metrics.jsonl and on the card")

    def connect() -> Recorder:
        writer = writers.EventFileWriter(str(directory / run))
        started = False

        def record(point: Point) -> None:
            nonlocal started
            if not started:
                # What an earlier session wrote at and after this point is not in the model: TensorBoard drops it.
                session = events.SessionLog(status=events.SessionLog.START)
                writer.add_event(events.Event(step=point.tokens, session_log=session))
                started = True
            values = [summaries.Summary.Value(tag=name, simple_value=v) for name, v in point.values.items()]
            summary = summaries.Summary(value=values)
            writer.add_event(events.Event(step=point.tokens, wall_time=point.time, summary=summary))

        return _Calls(record, writer.close)

    return connect


def _wandb(project: str, run: str, directory: Path, config: Mapping[str, Any]) -> Connect:
    wandb = _package("wandb", "wandb")

    def connect() -> Recorder:
        directory.mkdir(parents=True, exist_ok=True)
        session = wandb.init(
            project=project,
            id=run,
            name=run,
            resume="allow",
            dir=str(directory),
            config=dict(config),
            reinit="create_new",
        )
        # Its own step must never go back, the tokens of a lineage may after lost work.
        session.define_metric("tokens")
        session.define_metric("*", step_metric="tokens")
        return _Calls(
            lambda point: session.log({**point.values, "tokens": point.tokens}),
            session.finish,
        )

    return connect


class _MlflowRun:
    def __init__(self, mlflow: Any, client: Any, run_id: str) -> None:
        self._metric = mlflow.entities.Metric
        self._client = client
        self._run_id = run_id

    def record(self, points: Sequence[Point]) -> None:
        metrics = [
            self._metric(name, value, int(point.time * 1000), point.tokens)
            for point in points
            for name, value in point.values.items()
        ]
        self._client.log_batch(self._run_id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


def _mlflow(project: str, run: str, directory: Path, config: Mapping[str, Any]) -> Connect:
    mlflow = _package("mlflow", "mlflow")
    address = None  # what the user configured for MLflow itself goes first
    if not mlflow.tracking.is_tracking_uri_set():
        _package("sqlalchemy", "mlflow")
        address = f"sqlite:///{directory.absolute()}/mlflow.db"

    def connect() -> Recorder:
        if address is not None:
            directory.mkdir(parents=True, exist_ok=True)
        client = mlflow.MlflowClient(tracking_uri=address)
        experiment = client.get_experiment_by_name(project)
        experiment_id = experiment.experiment_id if experiment else client.create_experiment(project)
        earlier = client.search_runs([experiment_id], f"tags.`{_RUN_TAG}` = '{run}'", max_results=1)
        if earlier:
            client.update_run(earlier[0].info.run_id, status="RUNNING")
        found = (
            earlier[0] if earlier else client.create_run(experiment_id, run_name=run, tags={_RUN_TAG: run})
        )
        # One that was cut off before them gets them now.
        settings = () if found.data.params else tuple(config.items())
        params = [mlflow.entities.Param(name, str(value)) for name, value in settings]
        for start in range(0, len(params), _MOST_PARAMS):
            client.log_batch(found.info.run_id, params=params[start : start + _MOST_PARAMS])
        return _MlflowRun(mlflow, client, found.info.run_id)

    return connect


def _trackio(project: str, run: str, _directory: Path, config: Mapping[str, Any]) -> Connect:
    trackio = _package("trackio", "trackio")

    def connect() -> Recorder:
        session = trackio.init(
            project=project,
            name=run,
            resume="allow",
            config=dict(config),
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )
        return _Calls(lambda point: session.log(point.values, step=point.tokens), session.finish)

    return connect


RECORDERS: Final[dict[str, Callable[[str, str, Path, Mapping[str, Any]], Connect]]] = {
    "mlflow": _mlflow,
    "tensorboard": _tensorboard,
    "trackio": _trackio,
    "wandb": _wandb,
}
