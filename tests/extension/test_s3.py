"""The decorators with Metaflow's datastore on an S3 server."""

import subprocess
import sys
from pathlib import Path

import pytest
from soak.contents import Bucket

ELSEWHERE = """
import sys
from pathlib import Path
from metaflow import delete_model, load_model
from metaflow_hf.errors import NotFound
[found] = Path(load_model(sys.argv[1])).glob("config.json")
print(found.name)
delete_model(sys.argv[1])
try:
    load_model(sys.argv[1])
except NotFound as error:
    print(type(error).__name__)
    assert "it was deleted" in str(error), error
"""


@pytest.fixture
def s3(s3_datastore: dict[str, str]) -> dict[str, str]:
    return s3_datastore


def test_snapshots_models_and_checkpoints_live_in_the_bucket(
    run_flow, hub, s3: dict[str, str], project: Path, tmp_path: Path, flow_environment
):
    with hub.log.new() as log:
        outcome = run_flow("killed_flow.py", before=["--datastore=s3"], **s3)
    assert outcome.status == 0, outcome.output
    assert outcome.lines("goes on from half")
    # A process that knows its task only by the environment.
    assert outcome.lines("child saved 2")
    assert log.count(path="*/resolve/*/config.json", method="GET") == 1
    keys = list(Bucket(s3["METAFLOW_DATASTORE_SYSROOT_S3"], s3["METAFLOW_S3_ENDPOINT_URL"]))
    for kind in ("blobs", "manifests", "snapshots", "checkpoints", "models", "pins", "refs"):
        assert any(key.startswith(f"mf.hf/{kind}/") for key in keys), kind
    assert not list(project.rglob("mf.hf"))

    # Another machine: nothing is there but the bucket.
    elsewhere = {"METAFLOW_HF_CACHE": str(tmp_path / "elsewhere"), "METAFLOW_DEFAULT_DATASTORE": "s3"}
    [key] = [key.removeprefix("mf.hf/") for key in keys if key.startswith("mf.hf/models/")]
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, key],
        env={**flow_environment, **s3, **elsewhere},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["config.json", "NotFound"]
