"""One store of each kind, and an S3 server on localhost."""

import itertools
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from metaflow_hf.store import ObjectStore, open_store

_buckets = itertools.count()


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """The URL of an S3 server of this test process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{url}/moto-api/", timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError):
                assert server.poll() is None, "the S3 server ended"
                time.sleep(0.1)
        else:
            pytest.fail("the S3 server does not answer")
        yield url
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def s3_environment(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Metaflow's and boto3's settings for the S3 server, in this process and for children."""
    from metaflow import metaflow_config

    settings = {
        "METAFLOW_S3_ENDPOINT_URL": s3_endpoint,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    # Metaflow reads its settings once, at import.
    monkeypatch.setattr(metaflow_config, "S3_ENDPOINT_URL", s3_endpoint)
    return settings


@pytest.fixture
def s3_root(s3_endpoint: str, s3_environment: dict[str, str]) -> str:
    """An empty bucket with a prefix, as a URI."""
    bucket = f"bucket-{os.getpid()}-{next(_buckets)}"
    urllib.request.urlopen(
        urllib.request.Request(f"{s3_endpoint}/{bucket}", method="PUT"), timeout=10
    ).close()
    return f"s3://{bucket}/some/prefix"


@pytest.fixture(params=["memory", "disk", "s3"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where an empty store of each kind is."""
    if request.param == "memory":
        return f"memory://{tmp_path.name}-{os.getpid()}"
    if request.param == "disk":
        return str(tmp_path / "store")
    return request.getfixturevalue("s3_root")


@pytest.fixture
def store(location: str) -> ObjectStore:
    """An empty store of each kind."""
    return open_store(location)
