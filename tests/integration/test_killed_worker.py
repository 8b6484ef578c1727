"""A worker that is killed in the middle costs its claims of one round, nothing else."""

import os
import re
import signal
import time
from pathlib import Path

import pytest

from .conftest import ROOT, Shell

pytestmark = pytest.mark.timeout(900)


def test_branches_killed_and_told_to_end_are_retried_and_every_position_counts_once(
    shell: Shell, check_lineage
):
    text = (ROOT / "configs" / "demo.yaml").read_text()
    text = text.replace("max_tokens: 800_000", "max_tokens: 60_000\n  keep: all")
    text = text.replace("interval_seconds: 5", "interval_seconds: 0.5")
    text = text.replace("solo_start: 0.1", "solo_start: 0.0").replace("max_samples: 64", "max_samples: 8")
    config = shell.directory / "short.yaml"
    config.write_text(text)
    hurt: dict[str, int] = {}
    lines = []
    with shell.start(ROOT / "flows" / "train_flow.py", "--config", "config", config, "run") as run:
        for line in run.stdout:
            lines.append(line)
            found = re.search(r"/train/\d+ \(pid (\d+)\)\] \[worker (\d) \S+\] round \d+", line)
            if found and found[2] == "1" and not hurt:
                hurt["1"] = int(found[1])
                time.sleep(0.3)  # into its next claim
                os.kill(hurt["1"], signal.SIGKILL)
            elif found and found[2] == "0" and list(hurt) == ["1"]:
                # As a machine does that is taken away.
                hurt["0"] = int(found[1])
                os.kill(hurt["0"], signal.SIGTERM)
    output = "".join(lines)
    assert run.returncode == 0, output
    assert len(hurt) == 2, output
    assert "stopped before the lineage was final: it was told to stop" in output
    assert output.count("Task is starting (retry)") + output.lower().count("retrying") >= 2

    run_id = re.search(r"run-id (\d+)", output)[1]
    lineage: Path = shell.directory / ".metaflow" / "mf.hf" / "training" / f"TrainFlow-{run_id}"
    rounds = check_lineage(lineage)
    assert rounds[-1]["tokens"] >= 60_000
    claimants = {path.read_bytes() for path in (lineage / "claims").rglob("*.json")}
    assert len(claimants) > sum(len(manifest["accepted"]) for manifest in rounds) / 2
    # The killed process, its successor and the other branch.
    attempts = {accepted["attempt"] for manifest in rounds for accepted in manifest["accepted"]}
    assert len(attempts) >= 2
    # Whoever is told to end returns nothing, and yet what it told is in the run.
    reported = shell.succeed(
        "-c",
        "import json; from metaflow import Run, namespace; namespace(None); "
        f"metrics = Run('TrainFlow/{run_id}').data.metrics; "
        "print('told by', len({json.loads(line)['worker'] for m in metrics for line in m.splitlines()}))",
    )
    assert int(reported.rpartition("told by ")[2]) >= 3, reported


def test_an_interrupted_run_goes_on_from_its_last_round(shell: Shell, check_lineage):
    """As the README says: `python flows/train_flow.py resume`."""
    flow = ROOT / "flows" / "train_flow.py"
    text = (ROOT / "configs" / "demo.yaml").read_text()
    text = text.replace("max_tokens: 800_000", "max_tokens: 60_000").replace(
        "max_samples: 64", "max_samples: 8"
    )
    config = shell.directory / "short.yaml"
    config.write_text(text)
    with shell.start(flow, "--config", "config", config, "run") as run:
        lines = []
        for line in run.stdout:
            lines.append(line)
            if "] round 1: " in line:
                run.kill()
                break
        lines += run.stdout.readlines()
    output = "".join(lines)
    run_id = re.search(r"run-id (\d+)", output)[1]
    lineage = shell.directory / ".metaflow" / "mf.hf" / "training" / f"TrainFlow-{run_id}"
    before = {path.name: path.read_bytes() for path in (lineage / "rounds").iterdir()}
    assert len(before) >= 2

    output = shell.succeed(flow, "resume", timeout=500)
    assert "after training" in output
    rounds = check_lineage(lineage)
    assert len(rounds) > len(before)
    assert all((lineage / "rounds" / name).read_bytes() == content for name, content in before.items())
