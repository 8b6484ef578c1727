"""`current.huggingface_hub` and `current.model` where a flow is not needed to see what they do."""

import logging
from pathlib import Path

import pytest

from metaflow_hf.errors import SelectionError
from metaflow_hf.hub.loadspec import parse_models, parse_snapshots
from metaflow_hf.hub.records import RunContext
from metaflow_hf.hub.task_models import MISSING, TaskModels
from metaflow_hf.hub.task_snapshots import TaskSnapshots

RUN = RunContext("FlowX", "1", "start", "7", "user:tester")


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def task(own_hub, store, said, tmp_path: Path, monkeypatch) -> TaskSnapshots:
    monkeypatch.setenv("METAFLOW_HF_CACHE", str(tmp_path / "node"))
    return TaskSnapshots(store, run=RUN, say=said.append)


@pytest.fixture
def models(task, store, said) -> TaskModels:
    return TaskModels(store, run=RUN, say=said.append)


def test_two_repositories_that_overwrite_each_other_in_one_path_are_an_error(task, own_hub, tmp_path: Path):
    own_hub.content.add("other/model", {"config.json": b"{}"})
    own_hub.content.add("third/model", {"third.json": b"{}"})
    path = str(tmp_path / "shared")
    task.load_entries(parse_snapshots([("acme/model", path), ("third/model", path)]))
    with pytest.raises(SelectionError, match=r"both have a file 'config\.json'"):
        task.load_entries(parse_snapshots([("other/model", path)]))


def test_a_repository_is_found_by_its_id_unless_that_is_ambiguous(task, own_hub):
    own_hub.content.repo("acme/model").tag("v1")
    own_hub.content.add("third/one", {"config.json": b"{}"}).tag("v1")
    task.load_entries(parse_snapshots({"base": {"repo_id": "acme/model", "allow_patterns": "*.json"}}))
    assert task.loaded["acme/model"] == task.loaded["base"]
    task.load_entries(
        parse_snapshots([{"repo_id": "acme/model", "revision": "v1", "allow_patterns": "*.md"}])
    )
    assert Path(task.loaded["acme/model"], "README.md").exists()
    task.load_entries(
        parse_snapshots([{"repo_id": "third/one", "revision": revision} for revision in ("main", "v1")])
    )
    with pytest.raises(KeyError, match="several revisions of 'third/one'; name one of .*'third/one@v1'"):
        task.loaded["third/one"]
    with pytest.raises(KeyError, match="loaded: 'base', 'acme/model'"):
        task.loaded["nothing"]


def test_what_the_task_made_for_itself_goes_at_its_end(task, tmp_path: Path):
    task.load_entries(parse_snapshots(["acme/model", {"kept": ("acme/model@main", str(tmp_path / "kept"))}]))
    own, kept = Path(task.loaded["acme/model"]), Path(task.loaded["kept"])
    task.close()
    assert not own.exists()
    assert (kept / "config.json").exists()


def test_a_model_loads_from_whatever_holds_a_reference(task, models, said):
    reference = task.snapshot_download("acme/model", allow_patterns="*.json")
    artifacts = {"as_dict": reference, "as_key": reference["key"]}
    models.load_entries(
        parse_models(["as_dict", "as_key", reference["key"]]), lambda name: artifacts.get(name, MISSING)
    )
    assert len(models.loaded) == 3
    for path in models.loaded.values():
        assert [file.name for file in Path(path).iterdir()] == ["config.json"]
    assert any("Loaded artifact `as_dict[type:snapshot]` in 0.0" in line for line in said)


@pytest.mark.parametrize("value", [MISSING, 3, {"not": "a reference"}, "models/none/such/key/x/y.json"])
def test_best_effort_goes_on_and_says_so(models, said, value):
    entries = parse_models(["artifact"])
    models.load_entries(entries, lambda _: value, best_effort=True)
    assert dict(models.loaded) == {}
    assert said[-1].startswith("Artifact `artifact` was not loaded: ")
    with pytest.raises((SelectionError, LookupError)):
        models.load_entries(entries, lambda _: value)


def test_saving_what_was_loaded_stores_no_byte_twice(task, models, store):
    with task.load("acme/model") as path:
        before = [info.key for info in store.list("blobs")]
        saved = models.save(path, label="again", storage_format="tar")
    assert [info.key for info in store.list("blobs")] == before
    assert saved["num_files"] == 7


def test_arguments_without_meaning_are_mentioned_in_the_debug_log(task, caplog):
    with caplog.at_level(logging.DEBUG, logger="metaflow_hf.hub"):
        task.snapshot_download("acme/model", cache_dir="/x", allow_patterns="*.json")
    assert "ignored: cache_dir" in caplog.text


def test_a_dry_run_leaves_the_datastore_empty(task, store, files):
    plan = task.snapshot_download("acme/model", dry_run=True)
    assert {item.filename for item in plan} == set(files)
    assert task.hf_hub_download("acme/model", "config.json", dry_run=True).filename == "config.json"
    assert list(store.list()) == []
    for load in (
        lambda: task.load_entries(parse_snapshots({"repo_id": "acme/model", "dry_run": True})),
        lambda: task.load("acme/model", dry_run=True).__enter__(),
        lambda: task.download_many(["acme/model"], dry_run=True),
    ):
        with pytest.raises(SelectionError, match=r"snapshot_download\(…, dry_run=True\)"):
            load()
    assert list(store.list()) == []
