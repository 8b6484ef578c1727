"""Trackers: what they record, the error without their package, and the same run after a restart."""

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from serving import serving

from metaflow_hf import errors
from metaflow_hf import events as ev
from metaflow_hf.report import open_tracker
from metaflow_hf.report.trackers import Tracker, figures


def step(tokens_total, loss=3.0):
    return ev.StepDone(
        time=0,
        round=0,
        step=1,
        loss=loss,
        learning_rate=1e-3,
        tokens=100,
        seconds=0.5,
        tokens_total=tokens_total,
        tokens_planned=1000,
        memory_bytes=2**30,
    )


EVALUATED = ev.Evaluated(time=0, name="after", loss=2.0, perplexity=7.4, bits_per_byte=1.0, tokens=1, bytes=1)


def test_figures():
    assert figures(step(100)) == {
        "train/loss": 3.0,
        "train/learning_rate": 1e-3,
        "train/tokens_per_second": 200.0,
        "train/memory_gib": 1.0,
    }
    assert figures(EVALUATED)["evaluation/after/perplexity"] == 7.4
    assert figures(ev.Notice(time=0, message="")) == {}


class Server:
    """A tracker's server that is down whenever the test says so."""

    def __init__(self):
        self.is_down = False
        self.points, self.tries, self.is_closed = [], threading.Semaphore(0), False

    def connect(self):
        self._answer()
        return self

    def record(self, points):
        self._answer()
        self.points += points

    def close(self):
        self._answer()
        self.is_closed = True

    def _answer(self):
        self.tries.release()
        if self.is_down:
            raise ConnectionError("nobody listens on port 5000")

    def tracker(self, **settings):
        return Tracker("mlflow", self.connect, **settings)


def test_the_axis_is_the_tokens_of_the_lineage_and_nothing_infinite_is_recorded():
    server = Server()
    with server.tracker() as tracker:
        tracker(step(500, loss=float("nan")))
        tracker(ev.Notice(time=0, message="x"))
        tracker(EVALUATED)
    assert [point.tokens for point in server.points] == [500, 500]
    assert "train/loss" not in server.points[0].values
    assert "train/learning_rate" in server.points[0].values
    assert server.is_closed


@pytest.mark.parametrize("is_down_at_first", [True, False])
def test_a_server_that_goes_down_costs_a_warning_and_nothing_else(caplog, is_down_at_first):
    """Down when the tracker is opened, or in the middle; up again later: every point is recorded once, in order."""
    server = Server()
    server.is_down = is_down_at_first
    with server.tracker(retry_seconds=0.01) as tracker:
        assert server.tries.acquire(timeout=60)
        for tokens in range(100, 400, 100):
            server.is_down = is_down_at_first or tokens > 100
            tracker(step(tokens))
            assert server.tries.acquire(timeout=60)
        for _ in range(3):  # it is tried again and again
            assert server.tries.acquire(timeout=60)
        server.is_down = False
        tracker(step(400))
    assert [point.tokens for point in server.points] == [100, 200, 300, 400]
    assert server.is_closed
    (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert warning.getMessage() == (
        "report.trackers: mlflow does not answer (ConnectionError: nobody listens on port 5000). Training goes on, "
        "metrics.jsonl has every figure; it is tried again every 0.01 s."
    )


def test_one_that_stays_down_is_told_at_the_end_too(caplog):
    server = Server()
    with server.tracker() as tracker:
        tracker(step(100))
        while not server.points:
            assert server.tries.acquire(timeout=60)
        server.is_down = True
        tracker(step(200))
        tracker(EVALUATED)
    assert [point.tokens for point in server.points] == [100]
    assert "mlflow did not record 2 points; metrics.jsonl has them." in caplog.messages[-1]


def test_nobody_waits_for_one_that_hangs(caplog):
    """A request that is never answered: neither those who tell events nor the end of the run wait for it."""
    answer = threading.Event()
    with Tracker("wandb", answer.wait, close_seconds=0.1) as tracker:
        for tokens in range(100, 1_100, 100):
            tracker(step(tokens))
    assert "wandb did not record 10 points" in caplog.text
    answer.set()


def test_an_unknown_tracker_names_the_known(tmp_path):
    with pytest.raises(errors.ConfigError, match="mlflow, tensorboard, trackio, wandb"):
        open_tracker("tensorbord", run="r", directory=tmp_path)


@pytest.mark.parametrize(
    ("kind", "module"),
    [("tensorboard", "tensorboard"), ("wandb", "wandb"), ("mlflow", "mlflow"), ("trackio", "trackio")],
)
def test_a_missing_package_is_one_error_that_names_the_extra(tmp_path, monkeypatch, kind, module):
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_Missing(module), *sys.meta_path])
    with pytest.raises(errors.ConfigError, match=rf"metaflow-hf\[{kind}\]"):
        open_tracker(kind, run="r", directory=tmp_path)


class _Missing:
    def __init__(self, module):
        self.module = module

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == self.module:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_tensorboard_goes_on_with_the_same_run(tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start in (100, 200):  # the second session takes up at 200: what the first wrote there is dropped
        with open_tracker("tensorboard", run="lineage/w 0", directory=tmp_path) as tracker:
            for tokens in range(start, start + 200, 100):
                tracker(step(tokens, loss=start))
    (run,) = tmp_path.iterdir()
    assert run.name == "lineage-w-0"
    accumulator = accumulators.EventAccumulator(str(run)).Reload()
    points = [(point.step, point.value) for point in accumulator.Scalars("train/loss")]
    assert points == [(100, 100.0), (200, 200.0), (300, 200.0)]


@pytest.mark.filterwarnings("ignore")
def test_mlflow_goes_on_with_the_same_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for start in (100, 200):
        with open_tracker("mlflow", run="lineage-w0", directory=tmp_path, config={"lr": 1}) as tracker:
            tracker(step(start))
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("metaflow-hf").experiment_id])
    assert run.info.status == "FINISHED"
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")] == [100, 200]


class _MlflowAnswers(BaseHTTPRequestHandler):
    """As much of MLflow's server as one run takes; ``server.figures`` are what it was sent."""

    def do_GET(self):
        self._answer(experiment={"experiment_id": "1", "name": "metaflow-hf"})

    def do_POST(self):
        sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.figures += [(one["key"], one["step"]) for one in sent.get("metrics", [])]
        info = {"run_id": "7", "run_uuid": "7", "experiment_id": "1", "status": "RUNNING", "user_id": "ann"}
        self._answer(runs=[{"info": info, "data": {"params": [{"key": "lr", "value": "1"}]}}], run_info=info)

    def _answer(self, **values):
        body = json.dumps(values).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.mark.filterwarnings("ignore")
def test_an_mlflow_server_that_is_stopped_while_training_goes_on(monkeypatch, caplog):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving(HTTPServer(("127.0.0.1", 0), _MlflowAnswers)) as server:
        port, server.figures = server.server_port, []
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        tracker = open_tracker("mlflow", run="lineage-w0", directory="unused")
        tracker(step(100))
        wait_for(lambda: server.figures)
    tracker(step(200))
    wait_for(lambda: "mlflow does not answer" in caplog.text)
    with serving(HTTPServer(("127.0.0.1", port), _MlflowAnswers)) as again:
        again.figures = []
        tracker(step(300))
        tracker.close()
    names = ["train/loss", "train/learning_rate", "train/tokens_per_second", "train/memory_gib"]
    assert server.figures == [(name, 100) for name in names]
    assert again.figures == [(name, tokens) for tokens in (200, 300) for name in names]


def wait_for(condition):
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.filterwarnings("ignore")
def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for start in (100, 200):
        with open_tracker("wandb", run="lineage-w0", directory=tmp_path, config={"lr": 1}) as tracker:
            tracker(step(start))
            tracker(EVALUATED)
    sessions = [path for path in (tmp_path / "wandb").iterdir() if path.name.startswith("offline-run-")]
    assert sessions
    assert all(path.name.endswith("-lineage-w0") for path in sessions)


@pytest.mark.filterwarnings("ignore")
def test_trackio_goes_on_with_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    pytest.importorskip("trackio")
    for start in (100, 200):
        with open_tracker("trackio", run="lineage-w0", directory=tmp_path) as tracker:
            tracker(step(start))
    from trackio.sqlite_storage import SQLiteStorage

    assert SQLiteStorage.get_runs("metaflow-hf") == ["lineage-w0"]
    logs = SQLiteStorage.get_logs("metaflow-hf", "lineage-w0")
    assert [(log["step"], log["train/loss"]) for log in logs] == [(100, 3.0), (200, 3.0)]
