"""The decorators with Metaflow's datastore on an S3 server."""

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest


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
            "METAFLOW_DEFAULT_DATASTORE": "s3",
            "METAFLOW_DATASTORE_SYSROOT_S3": "s3://bucket/metaflow",
            "METAFLOW_S3_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    finally:
        server.kill()
        server.wait()


def test_snapshots_models_and_checkpoints_live_in_the_bucket(run_flow, hub, s3: dict[str, str]):
    with hub.log.new() as log:
        outcome = run_flow("killed_flow.py", **s3)
    assert outcome.status == 0, outcome.output
    assert outcome.lines("goes on from half")
    assert log.count(path="*/resolve/*/config.json", method="GET") == 1
    with urllib.request.urlopen(f"{s3['METAFLOW_S3_ENDPOINT_URL']}/bucket?list-type=2", timeout=10) as answer:
        listing = answer.read().decode()
    for kind in ("blobs", "manifests", "snapshots", "checkpoints", "models"):
        assert f"<Key>metaflow/mf.hf/{kind}/" in listing
