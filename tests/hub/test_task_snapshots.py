"""`current.huggingface_hub` and `current.model` where a flow is not needed to see what they do."""

import logging
import shutil
from pathlib import Path

import pytest

from metaflow_hf.errors import NotFound, SelectionError
from metaflow_hf.hub.checkpoints import TaskCheckpoints
from metaflow_hf.hub.linking import may_link
from metaflow_hf.hub.loading import load_reference
from metaflow_hf.hub.loadspec import parse_models, parse_snapshots
from metaflow_hf.hub.records import RunContext
from metaflow_hf.hub.task_models import MISSING, TaskModels
from metaflow_hf.hub.task_snapshots import TaskSnapshots
from metaflow_hf.store.checkpoints import CheckpointTask
from metaflow_hf.store.models import delete_reference

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


def test_two_models_do_not_mix_in_one_path(models, tmp_path: Path):
    references = []
    for name, files in (("one", ("config.json", "model-1-of-2")), ("two", ("config.json", "model"))):
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_text(name)
        references.append(models.save(tmp_path / name))
    path = tmp_path / "here"
    for _ in range(2):
        models.load(references[0], str(path))
    with pytest.raises(SelectionError, match=r"both have a file 'config\.json'"):
        models.load(references[1], str(path))
    assert (path / "config.json").read_text() == "one"
    shutil.rmtree(path)
    models.load(references[1], str(path))
    assert sorted(file.name for file in path.iterdir()) == ["config.json", "model"]


def test_two_repositories_that_are_on_their_way_to_one_path_are_an_error(task, own_hub, tmp_path: Path):
    own_hub.content.add("other/model", {"config.json": b"{}"})
    path = str(tmp_path / "shared")
    with (
        task._directories.claim(Path(path), ["config.json"], "another one"),
        pytest.raises(SelectionError, match="both have a file"),
    ):
        task.snapshot_download("other/model", local_dir=path)
    task.snapshot_download("other/model", local_dir=path)


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
    with pytest.raises(KeyError, match="several times; name one of 'third/one@main', 'third/one@v1'\"$"):
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


@pytest.mark.parametrize("kind", ["snapshot", "model", "checkpoint"])
def test_a_deleted_reference_is_one_clear_error_wherever_it_is_used(
    task, models, store, said, tmp_path: Path, monkeypatch, kind
):
    monkeypatch.setattr("metaflow_hf.hub.loading.configured_store", lambda: store)
    (tmp_path / "weights.bin").write_bytes(b"weights")
    point = TaskCheckpoints(store, CheckpointTask(flow="FlowX", run="1", step="start", task="7"))
    reference = {
        "snapshot": lambda: task.snapshot_download("acme/model", allow_patterns="*.json"),
        "model": lambda: models.save(tmp_path / "weights.bin"),
        "checkpoint": lambda: point.save(tmp_path / "weights.bin"),
    }[kind]()
    assert reference["type"] == kind
    delete_reference(store, reference)
    for use in (
        lambda: load_reference(reference),
        lambda: load_reference(reference["key"], tmp_path / "out"),
        lambda: models.load(reference),
        lambda: models.load_entries(parse_models("artifact"), lambda _: reference),
        lambda: point.load(reference),
        lambda: delete_reference(store, reference),
    ):
        with pytest.raises(NotFound) as caught:
            use()
        assert reference["key"] in str(caught.value)
        assert "it was deleted, or was written to another datastore" in str(caught.value)
    assert not (tmp_path / "out").exists()
    models.load_entries(parse_models("artifact"), lambda _: reference, best_effort=True)
    assert "it was deleted" in said[-1]
    # Whoever asks for the snapshot gets it again; the bytes were never gone.
    if kind == "snapshot":
        assert task.snapshot_download("acme/model", allow_patterns="*.json")["key"] == reference["key"]
        assert Path(models.load(reference), "config.json").exists()


@pytest.mark.parametrize(("argument", "variable"), [("copy", None), (None, "copy"), ("copy", "auto")])
def test_who_wants_no_link_gets_writable_files(
    task, store, tmp_path: Path, monkeypatch, argument, variable, own_hub
):
    monkeypatch.setattr("metaflow_hf.store.materialize.LARGE_BYTES", 1000)
    monkeypatch.setattr("metaflow_hf.store.materialize._reflink", lambda *_: False)
    task.load_entries(parse_snapshots("acme/model"))
    linked = Path(task.loaded["acme/model"], "model-00001-of-00004.safetensors")
    assert linked.stat().st_nlink > 1
    if variable is not None:
        monkeypatch.setenv("METAFLOW_HF_MATERIALIZE", variable)
    own = {"run": RUN, "say": lambda _: None, "materialize": argument}
    with TaskSnapshots(store, **own).load("acme/model") as path:
        reference = task.snapshot_download("acme/model")
        for place in (path, TaskModels(store, **own).load(reference)):
            file = Path(place, linked.name)
            assert file.stat().st_nlink == 1
            assert file.stat().st_mode & 0o200


def test_an_unknown_way_to_materialize_is_refused(monkeypatch):
    with pytest.raises(SelectionError, match="materialize='symlink' is none of auto, copy"):
        may_link("symlink")
    monkeypatch.setenv("METAFLOW_HF_MATERIALIZE", "hard")
    with pytest.raises(SelectionError, match="METAFLOW_HF_MATERIALIZE='hard'"):
        may_link()
    assert may_link("auto")


def test_models_and_checkpoints_share_the_bytes_of_snapshots(task, models, store, tmp_path: Path):
    with task.load("acme/model") as path:
        blobs = [info.key for info in store.list("blobs")]
        first = TaskCheckpoints(store, CheckpointTask(flow="Other", run="9", step="s", task="1"))
        first.save(path)
        models.save(path)
    assert [info.key for info in store.list("blobs")] == blobs


def test_checkpoints_are_listed_newest_first_and_loaded_into_the_directory(
    store, tmp_path: Path, monkeypatch
):
    monkeypatch.setenv("METAFLOW_HF_CACHE", str(tmp_path / "node"))
    (tmp_path / "state").write_text("x")
    who = CheckpointTask(flow="F", run="1", step="s", task="2")
    point = TaskCheckpoints(store, who)
    for name in ("a", "b", "a"):
        point.save(tmp_path / "state", name=name)
    assert [item["version"] for item in point.list()] == [3, 2, 1]
    assert [item["version"] for item in point.list(name="a", attempt="0")] == [3, 1]
    assert point.list(attempt=1) == []
    assert [item.version for item in point.list(task="F/1/s/2", as_dict=False)] == [3, 2, 1]
    assert len(point.list(full_namespace=True)) == 3
    first = point.directory
    loaded = point.load(point.list()[-1])
    assert point.directory == loaded != first
    point.close()
    assert not Path(first).exists()
    assert not Path(loaded).exists()
