"""`@checkpoint` in real runs: killed, retried, resumed, repeated, and seen from outside."""

import re
from pathlib import Path

import pytest

from metaflow_hf.errors import SelectionError
from metaflow_hf.store import datastore


def test_killed_branches_and_failed_runs_go_on(run_flow, project: Path, monkeypatch, tmp_path: Path):
    first = run_flow("checkpoint_flow.py", "--fail", "True")
    assert first.status != 0
    assert first.lines("on purpose")
    assert not first.lines("AssertionError")
    assert len(first.lines("[@checkpoint] Loaded checkpoint step.2 (version 2) of CheckpointFlow/")) == 2
    assert first.lines("join began with None")

    resumed = run_flow("checkpoint_flow.py", command="resume")
    assert resumed.status == 0, resumed.output
    [line] = resumed.lines("end goes on from CheckpointFlow/")
    run_id = re.search(r"run-id (\d+)", first.output)[1]
    assert f"CheckpointFlow/{run_id}/end/" in line

    second = run_flow("checkpoint_flow.py")
    assert second.status == 0, second.output
    assert second.lines("join began with {'run': '" + run_id + "'}")

    # A notebook, knowing nothing but the task.
    from metaflow import Checkpoint

    monkeypatch.setattr(datastore, "_active", ("local", str(project / ".metaflow")))
    monkeypatch.setenv("METAFLOW_HF_CACHE", str(tmp_path / "node-cache"))
    task = re.search(r"CheckpointFlow/\d+/end/\d+", line)[0]
    with Checkpoint() as outside:
        [found] = outside.list(task=task)
        directory = Path(outside.load(found))
        assert (directory / "half").read_text() == "done"
        for needs_a_task in (outside.list, outside.save):
            with pytest.raises(SelectionError, match="only a task with @checkpoint"):
                needs_a_task()
        with pytest.raises(SelectionError, match="is no task"):
            outside.list(task="CheckpointFlow")
    assert not directory.exists()


def test_an_unknown_policy_is_told_before_anything_runs(run_flow, project: Path):
    flow = project / "wrong.py"
    text = (Path(__file__).parent / "flows" / "checkpoint_flow.py").read_text()
    flow.write_text(text.replace('"eager"', '"keen"'))
    outcome = run_flow(flow)
    assert outcome.status != 0
    assert outcome.lines("@checkpoint of step 'join': load_policy='keen' is none of fresh, eager, none")
    assert not outcome.lines("Task is starting")
