"""`flows/dataset_flow.py` as people run it: on this machine and on S3, in any number of branches, killed in between."""

import json
import os
import re
import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from metaflow_hf.data import verify_blocks
from metaflow_hf.data.sharded import ShardedDataset
from metaflow_hf.errors import SelectionError
from metaflow_hf.store import datastore, open_store
from metaflow_hf.train.job import TrainingJob

from .conftest import ROOT, Shell

pytestmark = pytest.mark.timeout(400)
FLOW = ROOT / "flows" / "dataset_flow.py"


@pytest.fixture
def s3() -> Iterator[dict[str, str]]:
    """The environment that makes Metaflow use an S3 server of this test, with an empty bucket."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    try:
        urllib.request.urlopen(urllib.request.Request(f"{url}/bucket", method="PUT"), timeout=60).close()
        yield {
            "METAFLOW_DEFAULT_DATASTORE": "s3",
            "METAFLOW_DATASTORE_SYSROOT_S3": "s3://bucket/metaflow",
            "METAFLOW_S3_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    finally:
        server.stop()


def key_of(output: str) -> str:
    return re.search(r"train_flow.py run --dataset (datasets/\S+)", output)[1]


def test_on_s3_a_killed_branch_changes_nothing(shell: Shell, hub, hub_environment, s3, tmp_path: Path):
    options = ["--dataset", "hf://acme/parquet", "--num_branches", "2", "--samples_per_block", "50"]
    lines, killed = [], None
    with shell.start(FLOW, "run", *options, **hub_environment, **s3) as run:
        for line in run.stdout:
            lines.append(line)
            started = re.search(r"/build/\d+ \(pid (\d+)\)\] Task is starting", line)
            if started and killed is None:
                killed = int(started[1])
                os.kill(killed, signal.SIGKILL)
    output = "".join(lines)
    assert run.returncode == 0, output
    assert "Task is starting (retry)" in output
    assert "240 rows in 6 blocks" in output

    plan = ShardedDataset.plan("hf://acme/parquet", samples_per_block=50)
    assert key_of(output) == plan.key
    plan.build(range(2), open_store(tmp_path / "here"))
    plan.assemble(open_store(tmp_path / "here"))
    bucket = boto3.client(
        "s3",
        endpoint_url=s3["METAFLOW_S3_ENDPOINT_URL"],
        aws_access_key_id="key",
        aws_secret_access_key="secret",
        region_name="us-east-1",
    )
    stored = bucket.get_object(Bucket="bucket", Key=f"metaflow/mf.hf/{plan.key}/block_manifest.json")
    assert stored["Body"].read() == (tmp_path / "here/block_manifest.json").read_bytes()


def test_without_arguments_and_on_to_a_training(shell: Shell, monkeypatch):
    output = shell.succeed(FLOW, "run", timeout=200)
    key = key_of(output)
    root = shell.directory / ".metaflow"
    dataset = root / "mf.hf" / key
    manifest = json.loads((dataset / "block_manifest.json").read_text())
    assert f"{manifest['total_samples']:,} rows in {manifest['total_blocks']} blocks" in output
    assert [block["file_path"].split("/")[1] for block in manifest["blocks"]] == ["00000", "00001"]
    assert verify_blocks(dataset) == []

    monkeypatch.setattr(datastore, "_active", ("local", str(root)))
    values = {"model": {"repo_id": "a/model"}}
    job = TrainingJob.configured(values, run="Flow-1", dataset=key).check_data().build()
    assert job.training == key
    with pytest.raises(SelectionError, match="blocks ls"):
        TrainingJob.configured(values, run="Flow-1", dataset="datasets/no-such").check_data()
