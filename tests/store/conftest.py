"""One store of each kind."""

import os
from pathlib import Path

import pytest

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
