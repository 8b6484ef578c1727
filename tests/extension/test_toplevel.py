"""What `from metaflow import …` gives outside of any flow."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from metaflow_hf.errors import NotFound
from metaflow_hf.store import datastore
from metaflow_hf.store.models import save_directory


@pytest.fixture
def reference(tmp_path: Path, monkeypatch) -> dict:
    monkeypatch.setenv("METAFLOW_HF_CACHE", str(tmp_path / "node"))
    monkeypatch.setattr(datastore, "_active", ("local", str(tmp_path / ".metaflow")))
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    saved = save_directory(datastore.configured_store(), model, flow="F", run="1", step="s", task="2")
    return json.loads(json.dumps(saved.to_json()))


def test_a_model_is_loaded_and_deleted_by_its_reference_or_key(reference: dict, tmp_path: Path):
    from metaflow import delete_model, load_model

    assert Path(load_model(reference), "config.json").read_text() == "{}"
    assert load_model(reference["key"], str(tmp_path / "here")) == str(tmp_path / "here")
    delete_model(reference)
    with pytest.raises(NotFound):
        load_model(reference)


def test_the_package_is_shipped_with_remote_tasks(subprocess_environment, tmp_path: Path):
    flow = Path(__file__).parent / "flows" / "dynamic_flow.py"
    listing = subprocess.run(
        [sys.executable, str(flow), "package", "list"],
        cwd=tmp_path,
        env=subprocess_environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    ).stdout
    for module in ("metaflow_hf/hub/snapshots.py", "metaflow_extensions/hf/plugins/model_decorator.py"):
        assert module in listing
