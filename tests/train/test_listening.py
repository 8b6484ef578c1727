"""Who listens to a worker: the lines that it begins with, and trackers that know what is trained."""

import platform
import re
from unittest.mock import Mock

from metaflow_hf import __version__
from metaflow_hf.events import StepDone
from metaflow_hf.report import read_events, recorders
from metaflow_hf.report.trackers import Tracker
from metaflow_hf.train import listening
from metaflow_hf.train.lineage import Lineage
from metaflow_hf.train.listening import Listeners


def listeners_of(training, write=lambda _: None) -> Listeners:
    return Listeners(
        config=training.config,
        lineage=training.lineage,
        store=training.store,
        branch=1,
        attempt="0123",
        write=write,
    )


def test_a_worker_begins_with_five_lines_that_say_all(training, tmp_path):
    def banner() -> list[str]:
        said: list[str] = []
        with listeners_of(training, said.append).open(tmp_path / "metrics.jsonl"):
            pass
        return [line.removeprefix("│ ") for line in said[0].splitlines() if line.startswith("│ ")]

    training.start(rounds={"max_tokens": 1_000, "seconds": 0.1})
    first, model, data, lineage, until = banner()
    assert first.startswith(f"metaflow-hf {__version__}, worker 1 of 1 on {platform.node()} (attempt 0123), ")
    assert model.startswith("model    ")
    assert "batches of 4 x 32 tokens" in data
    assert lineage == "lineage  test, at its beginning; learning rate 1.0e-2, cosine"
    assert until == "until    1,000 tokens, or 1 epoch of the data; rounds of 0.1 s; if interrupted, resume"
    training.work()
    assert re.match(r"lineage  test, after round \d+ \(1,\d+ tokens\)", banner()[3])


def test_trackers_get_a_run_of_the_branch_and_every_setting(training, tmp_path, monkeypatch):
    opened = []

    def open_tracker(kind, **told):
        opened.append((kind, told["run"], told["config"]))
        return Tracker(kind, Mock())

    monkeypatch.setattr(listening, "open_tracker", open_tracker)
    training.config = training.config.replace(report={"trackers": ["wandb", "mlflow"]})
    with listeners_of(training).open(tmp_path / "metrics.jsonl"):
        pass
    assert [(kind, run) for kind, run, _ in opened] == [("wandb", "test-1"), ("mlflow", "test-1")]
    settings = opened[0][2]
    assert (settings["optimizer.learning_rate"], settings["data.batch_size"]) == (1e-2, 4)


def test_a_tracker_that_goes_down_while_workers_train_ends_no_training(
    training, tmp_path, monkeypatch, caplog
):
    recorded = []

    class Session:
        def record(self, points):
            if recorded:
                raise ConnectionError("nobody listens on port 5000")
            recorded.extend(points)

    monkeypatch.setitem(recorders.RECORDERS, "mlflow", lambda *_: Session)
    training.start(rounds={"max_tokens": 1_000, "seconds": 0.1}, report={"trackers": ["mlflow"]})
    metrics = tmp_path / "metrics.jsonl"
    with listeners_of(training).open(metrics) as listener:
        training.work(on_event=listener)
    assert Lineage(training.store).newest().manifest.final
    steps = [event for event in read_events(metrics) if isinstance(event, StepDone)]
    assert steps[-1].tokens_total >= 1_000
    assert 0 < len(recorded) < len(steps)
    assert caplog.text.count("mlflow does not answer (ConnectionError: nobody listens on port 5000)") == 1
