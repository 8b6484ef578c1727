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


def test_a_resumed_loop_goes_on_in_its_turn_and_begins_the_next_as_ever(run_flow):
    first = run_flow("loop_flow.py")
    assert first.lines("turn 2 began with None")
    resumed = run_flow("loop_flow.py", command="resume")
    assert resumed.status == 0, resumed.output
    assert resumed.lines("turn 2 began with {'turn': 2}")
    assert resumed.lines("turn 3 began with None")


def test_an_unknown_policy_is_refused():
    import metaflow.plugins  # loads the extension's decorators

    [decorator] = [kind for kind in metaflow.plugins.STEP_DECORATORS if kind.name == "checkpoint"]
    with pytest.raises(ValueError, match="load_policy='keen' is none of fresh, eager, none"):
        decorator({"load_policy": "keen"}).check_arguments()
