"""Trackers: what they record, the error without their package, and the same run after a restart."""

import sys

import pytest

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


def test_the_axis_is_the_tokens_of_the_lineage_and_nothing_infinite_is_recorded():
    logged, closed = [], []
    with Tracker(
        lambda values, tokens: logged.append((values, tokens)), lambda: closed.append(True)
    ) as tracker:
        tracker(step(500, loss=float("nan")))
        tracker(ev.Notice(time=0, message="x"))
        tracker(EVALUATED)
    assert [tokens for _, tokens in logged] == [500, 500]
    assert "train/loss" not in logged[0][0]
    assert "train/learning_rate" in logged[0][0]
    assert closed == [True]


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
