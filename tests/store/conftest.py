"""One store of each kind."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3_proxy import S3Proxy, running_proxy
from s3_server import S3Server

from metaflow_hf.store import ObjectStore, open_store


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


@pytest.fixture
def proxy(s3_server: S3Server, s3_root: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Proxy]:
    """What Metaflow's configuration says is S3."""
    from metaflow import metaflow_config

    with running_proxy(s3_server.url) as server:
        monkeypatch.setattr(metaflow_config, "S3_ENDPOINT_URL", server.url)
        yield server
