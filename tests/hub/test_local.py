"""huggingface_hub's functions through the cache: same arguments, local paths."""

import os
import time
from pathlib import Path

import pytest

from metaflow_hf.errors import EntryNotFoundError, SelectionError
from metaflow_hf.hub import hf_hub_download, resolve_revision, snapshot_download
from metaflow_hf.store import datastore
from metaflow_hf.store.eviction import trim
from metaflow_hf.store.node_cache import NodeCache


@pytest.fixture(autouse=True)
def own_datastore(own_hub, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("METAFLOW_HF_CACHE", str(tmp_path / "node"))
    monkeypatch.setattr(datastore, "_active", ("local", str(tmp_path / ".metaflow")))


def test_the_path_holds_the_files_and_stays_the_same(own_hub, read_tree, files):
    first = snapshot_download("acme/model")
    with own_hub.log.new() as log:
        second = snapshot_download("acme/model", revision="main")
    assert first == second
    assert log.file_bytes() == 0
    assert read_tree(Path(first)) == files


def test_an_edit_by_one_caller_does_not_reach_the_next(read_tree, files):
    path = Path(snapshot_download("acme/model"))
    (path / "config.json").write_text("edited")
    assert read_tree(Path(snapshot_download("acme/model"))) == files


def test_local_dir_gets_real_files_beside_what_lies_there(read_tree, files, tmp_path: Path):
    target = tmp_path / "here"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    for _ in range(2):
        assert snapshot_download("acme/model", local_dir=target) == str(target)
    assert read_tree(target) == {**files, "mine.txt": b"mine"}
    (target / "config.json").write_text("writable")


def test_a_single_file(files, own_hub):
    path = Path(hf_hub_download("acme/model", "vocab.txt", subfolder="tokenizer"))
    assert path.read_bytes() == files["tokenizer/vocab.txt"]
    assert own_hub.log.file_bytes() == len(files["tokenizer/vocab.txt"])
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("acme/model", "no.json")
    with pytest.raises(SelectionError):
        hf_hub_download("acme/model", "../../etc/passwd")


def test_arguments_of_huggingface_hub_are_accepted(tmp_path: Path):
    snapshot_download(
        repo_id="acme/model",
        repo_type="model",
        allow_patterns=["*.json"],
        ignore_patterns=["*.bin"],
        cache_dir="/custom/cache/path",
        local_dir=str(tmp_path / "model"),
        local_dir_use_symlinks=False,
        tqdm_class=None,
        etag_timeout=5,
        max_workers=2,
        library_name="x",
    )
    with pytest.raises(TypeError, match="nonsense"):
        snapshot_download("acme/model", nonsense=1)


def test_a_revision_resolves_to_its_commit(own_hub):
    assert resolve_revision("acme/model") == own_hub.content.repo("acme/model").resolve().sha


def test_a_dry_run_says_what_would_come_and_caches_nothing(own_hub, files, tmp_path: Path):
    store = datastore.configured_store()
    with own_hub.log.new() as log:
        plan = snapshot_download("acme/model", dry_run=True)
    assert log.file_bytes() == 0
    assert list(store.list()) == []
    assert {item.filename: item.file_size for item in plan} == {
        name: len(data) for name, data in files.items()
    }
    assert all(item.will_download and not item.is_cached for item in plan)
    assert {item.commit_hash for item in plan} == {own_hub.content.repo("acme/model").resolve().sha}

    local_dir = tmp_path / "not-made"
    one = hf_hub_download("acme/model", "config.json", dry_run=True, local_dir=local_dir)
    assert one.local_path == str(local_dir / "config.json")
    assert not local_dir.exists()
    with pytest.raises(SelectionError, match="no file"):
        snapshot_download("acme/model", allow_patterns="*.none", dry_run=True)


def test_a_dry_run_knows_what_is_stored(own_hub, files):
    path = snapshot_download("acme/model", ignore_patterns="*-00002-of-*")
    store = datastore.configured_store()
    before = [(info.key, info.last_modified) for info in store.list()]
    plan = {item.filename: item for item in snapshot_download("acme/model", dry_run=True)}
    assert [name for name, item in plan.items() if item.will_download] == ["model-00002-of-00004.safetensors"]
    same = snapshot_download("acme/model", ignore_patterns="*-00002-of-*", dry_run=True)
    assert all(item.is_cached for item in same)
    assert {str(Path(path, name)) for name in files if "00002" not in name} == {i.local_path for i in same}
    forced = snapshot_download("acme/model", force_download=True, dry_run=True)
    assert all(item.will_download for item in forced)
    assert [(info.key, info.last_modified) for info in store.list()] == before


def test_directories_that_nobody_asks_for_any_more_make_room(own_hub, files):
    old, used = (
        Path(snapshot_download("acme/model")),
        Path(snapshot_download("acme/model", allow_patterns="*")),
    )
    assert old != used
    week_ago = time.time() - 8 * 86_400
    os.utime(old, (week_ago, week_ago))
    cache = NodeCache.default()
    trim(cache, force=True)
    assert old.exists()
    trim(cache, force=True, max_bytes=100)
    assert not old.exists()
    assert (used / "config.json").exists()
    assert Path(snapshot_download("acme/model")) == old
    assert (old / "config.json").read_bytes() == files["config.json"]
