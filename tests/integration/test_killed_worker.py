"""A worker that is killed in the middle costs its claims of one round, nothing else; nor does a killed run cost more."""

import os
import re
import signal
import time
from pathlib import Path

import pytest

from .conftest import ROOT, Shell

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(900)]
FLOW = ROOT / "flows" / "train_flow.py"


def test_branches_and_the_run_itself_are_killed_and_every_position_counts_once(shell: Shell, check_lineage):
    text = (ROOT / "configs" / "demo.yaml").read_text()
    for old, new in {
        "max_tokens: 800_000": "max_tokens: 60_000\n  keep: all",
        "interval_seconds: 5": "interval_seconds: 0.5",
        "solo_start: 0.1": "solo_start: 0.0",
        "max_samples: 64": "max_samples: 8",
    }.items():
        assert old in text
        text = text.replace(old, new)
    config = shell.directory / "short.yaml"
    config.write_text(text)
    hurt: dict[str, int] = {}
    lines = []
    with shell.start(FLOW, "--config", "config", config, "run") as run:
        for line in run.stdout:
            lines.append(line)
            found = re.search(r"/train/\d+ \(pid (\d+)\)\] \[worker (\d) \S+\] round \d+", line)
            if not found:
                continue
            worker, pid = found[2], int(found[1])
            if worker == "1" and not hurt:
                time.sleep(0.3)  # into its next claim
                os.kill(pid, signal.SIGKILL)
                hurt["1"] = pid
            elif worker == "0" and list(hurt) == ["1"]:
                # As a machine does that is taken away.
                os.kill(pid, signal.SIGTERM)
                hurt["0"] = pid
            elif len(hurt) == 2 and pid not in hurt.values():
                # A successor is at work: now everything is gone.
                run.kill()
                break
        lines += run.stdout.readlines()
    output = "".join(lines)
    assert len(hurt) == 2, output
    assert run.returncode == -signal.SIGKILL, output
    assert "stopped before the lineage was final: it was told to stop" in output
    assert output.count("Task is starting (retry)") + output.lower().count("retrying") >= 2
    run_id = re.search(r"run-id (\d+)", output)[1]
    lineage: Path = shell.directory / ".metaflow" / "mf.hf" / "training" / f"TrainFlow-{run_id}"
    before = {path.name: path.read_bytes() for path in (lineage / "rounds").iterdir()}
    assert len(before) >= 2

    # As the README says.
    output = shell.succeed(FLOW, "resume", timeout=500)
    assert "after training" in output
    rounds = check_lineage(lineage)
    assert rounds[-1]["tokens"] >= 60_000
    assert len(rounds) > len(before)
    assert all((lineage / "rounds" / name).read_bytes() == content for name, content in before.items())
    claimants = {path.read_bytes() for path in (lineage / "claims").rglob("*.json")}
    assert len(claimants) > sum(len(manifest["accepted"]) for manifest in rounds) / 2
    # Of the first run and of the second.
    attempts = {accepted["attempt"] for manifest in rounds for accepted in manifest["accepted"]}
    assert len(attempts) >= 3
    # Whoever is told to end returns nothing, and yet what it told is in the run.
    resumed = re.search(r"run-id (\d+)", output)[1]
    reported = shell.succeed(
        "-c",
        "import json; from metaflow import Run, namespace; namespace(None); "
        f"metrics = Run('TrainFlow/{resumed}').data.metrics; "
        "print('told by', len({json.loads(line)['worker'] for m in metrics for line in m.splitlines()}))",
    )
    assert int(reported.rpartition("told by ")[2]) >= 3, reported
