"""A user's directory with a datastore of its own, and a hub on localhost."""

from pathlib import Path

import pytest

from metaflow_hf.store import datastore


@pytest.fixture
def project(hub, tmp_path: Path, monkeypatch) -> Path:
    directory = tmp_path / "project"
    directory.mkdir()
    monkeypatch.chdir(directory)
    monkeypatch.setattr(datastore, "_active", ("local", str(directory / ".metaflow")))
    return directory
