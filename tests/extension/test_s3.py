"""The decorators with Metaflow's datastore on an S3 server."""

import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

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
def s3() -> Iterator[dict[str, str]]:
    """An S3 server with an empty bucket, and the environment that makes Metaflow use it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            try:
                request = urllib.request.Request(f"{url}/bucket", method="PUT")
                urllib.request.urlopen(request, timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError):
                assert server.poll() is None, "the S3 server ended"
                time.sleep(0.1)
        yield {
            "METAFLOW_DATASTORE_SYSROOT_S3": "s3://bucket/metaflow",
            "METAFLOW_S3_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    finally:
        server.kill()
        server.wait()


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
    keys = listing(s3)
    for kind in ("blobs", "manifests", "snapshots", "checkpoints", "models", "pins", "refs"):
        assert any(key.startswith(f"metaflow/mf.hf/{kind}/") for key in keys), kind
    assert not list(project.rglob("mf.hf"))

    # Another machine: nothing is there but the bucket.
    elsewhere = {"METAFLOW_HF_CACHE": str(tmp_path / "elsewhere"), "METAFLOW_DEFAULT_DATASTORE": "s3"}
    [key] = [key.removeprefix("metaflow/mf.hf/") for key in keys if key.startswith("metaflow/mf.hf/models/")]
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, key],
        env={**flow_environment, **s3, **elsewhere},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["config.json", "NotFound"]


def listing(s3: dict[str, str]) -> list[str]:
    with urllib.request.urlopen(f"{s3['METAFLOW_S3_ENDPOINT_URL']}/bucket?list-type=2", timeout=10) as answer:
        return re.findall("<Key>([^<]+)</Key>", answer.read().decode())
