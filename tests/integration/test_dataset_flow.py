"""`flows/dataset_flow.py` as people run it: on S3, with a branch killed in between, and on to a training."""

import os
import re
import signal
from pathlib import Path

import pytest
from soak.contents import Bucket

from metaflow_hf.data.sharded import ShardedDataset
from metaflow_hf.errors import ConfigError, SelectionError
from metaflow_hf.store import datastore
from metaflow_hf.train.job import TrainingJob

from .conftest import ROOT, Shell

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(900)]
FLOW = ROOT / "flows" / "dataset_flow.py"


@pytest.fixture
def s3(s3_datastore) -> dict[str, str]:
    return {**s3_datastore, "METAFLOW_DEFAULT_DATASTORE": "s3"}


def test_on_s3_a_killed_branch_changes_nothing_and_a_training_takes_the_key(
    shell: Shell, hub, s3, tmp_path: Path, monkeypatch
):
    lines, killed = [], None
    with shell.start(FLOW, "run", "--samples_per_block", "200", **s3) as run:
        for line in run.stdout:
            lines.append(line)
            started = re.search(r"/build/\d+ \(pid (\d+)\)\] Task is starting", line)
            if started and killed is None:
                killed = int(started[1])
                os.kill(killed, signal.SIGKILL)
    output = "".join(lines)
    assert run.returncode == 0, output
    assert "Task is starting (retry)" in output

    # The same dataset from another hub, on a disk, in one process.
    monkeypatch.setattr(datastore, "_active", ("local", str(tmp_path / "here")))
    plan = ShardedDataset.plan("hf://metaflow-hf/python-docs", samples_per_block=200)
    plan.build(range(len(plan.sizes)))
    manifest = plan.assemble()
    key = re.search(r"train_flow.py run --dataset (datasets/\S+)", output)[1]
    assert key == plan.key
    assert f"{manifest.total_samples:,} rows in {manifest.total_blocks} blocks" in output
    stored = Bucket(s3["METAFLOW_DATASTORE_SYSROOT_S3"], s3["METAFLOW_S3_ENDPOINT_URL"])
    here = tmp_path / "here/mf.hf" / key
    assert stored[f"mf.hf/{key}/block_manifest.json"] == (here / "block_manifest.json").read_bytes()

    values = {"model": {"repo_id": "a/model"}}
    job = TrainingJob.configured(values, run="Flow-1", dataset=key).check_data().build()
    assert job.training == key
    with pytest.raises(SelectionError, match="blocks ls"):
        TrainingJob.configured(values, run="Flow-1", dataset="datasets/no-such").check_data()
    with pytest.raises(ConfigError, match="max_samples"):
        limited = {**values, "data": {"max_samples": 5}}
        TrainingJob.configured(limited, run="Flow-1", dataset=key).check_data()
