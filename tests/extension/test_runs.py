"""Whole runs: what a revision means in them, and many branches that want the same."""

import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from metaflow_hf.demo.content import HubContent

FLOWS = Path(__file__).parent / "flows"


def test_a_moved_branch_is_seen_by_the_next_run_only(run_flow, hub):
    assert isinstance(hub.content, HubContent)
    repo = hub.content.add("acme/moving", {"config.json": b"{}"})
    first = repo.resolve().sha
    run = run_flow("pins_flow.py", "--namespace", "")
    assert run.status != 0
    assert len(run.lines("RuntimeError: on purpose")) == 2, run.output
    second = repo.resolve().sha
    assert second != first

    with hub.log.new() as log:
        resumed = run_flow("pins_flow.py", command="resume")
    assert resumed.status == 0, resumed.output
    assert resumed.lines(f"has {first} under snapshots/checkpoint/PinsFlow/end/user:tester/")
    # What the run had resolved counts for the one that resumes it, without a question to the hub.
    assert len(log) == 0

    after = run_flow("pins_flow.py", "--once", "True", "--namespace", "")
    assert after.status == 0, after.output
    assert after.lines(f"has {second} under snapshots/checkpoint/PinsFlow/end/_global/")


@pytest.mark.timeout(450)
def test_eight_branches_make_one_download_though_its_holder_is_killed(hub, flow_environment, project: Path):
    assert isinstance(hub.content, HubContent)
    shards = {f"model-{n:05d}-of-00004.safetensors": random.Random(n).randbytes(300_000) for n in range(1, 5)}
    hub.content.add("acme/sharded", {"config.json": b"{}", **shards})
    gate = hub.faults.hold_next(1, path="/lfs/*00003*", method="GET")
    with hub.log.new() as log:
        process = subprocess.Popen(
            [sys.executable, str(FLOWS / "fan_flow.py"), "run", "--max-workers", "8"],
            cwd=project,
            env=flow_environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert gate.wait_until_held(200), (process.kill(), process.communicate())
        [lease] = project.glob(".metaflow/mf.hf/leases/**/0000000001.json")
        os.kill(int(re.search(r"pid (\d+)", lease.read_text())[1]), signal.SIGKILL)
        gate.open()
        output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert "eight have 5 files" in output
    assert len(re.findall(r"Task is starting \(retry\)", output)) == 1
    # The third shard was cut off with its holder.
    for name in (name for name in shards if "-00003-" not in name):
        assert log.file_bytes(path=f"*{name}") == len(shards[name]), name
    assert log.count(path="*/revision/main") >= 1
    assert log.count(path="*/tree/*") <= 4
