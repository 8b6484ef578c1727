"""Many downloads, staged ones, published ones; what is cached; searching and pushing."""

import logging
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from huggingface_hub import constants

from metaflow_hf.errors import GatedRepoError, HubUnavailable, IntegrityError, NotFound, SelectionError
from metaflow_hf.hub import (
    download_large_model,
    download_many,
    production_download,
    push,
    scan_cache,
    search_datasets,
    snapshot_download,
)
from metaflow_hf.store import datastore
from metaflow_hf.store.models import load_directory, save_directory
from metaflow_hf.store.node_cache import NodeCache


@pytest.fixture(autouse=True)
def own_datastore(own_hub, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("METAFLOW_HF_CACHE", str(tmp_path / "node"))
    monkeypatch.setattr(datastore, "_active", ("local", str(tmp_path / ".metaflow")))


def test_each_of_many_has_a_result_of_its_own(read_tree, files):
    wanted = ["acme/model", "no/such", "acme/gated", "../etc", "acme/model"]
    results = download_many(wanted, max_workers=2)
    assert list(results) == wanted[:-1]
    assert read_tree(Path(results["acme/model"].pop("path"))) == files
    assert results.pop("acme/model") == {"status": "success"}
    assert {result["status"] for result in results.values()} == {"error"}
    assert "no such repository" in results["no/such"]["error"]
    assert "gated" in results["acme/gated"]["error"]
    with pytest.raises(SelectionError):
        download_many(wanted, local_dir="shared")


def test_a_large_model_comes_in_stages_of_one_commit(own_hub, read_tree, files, caplog):
    with own_hub.log.new() as log, caplog.at_level(logging.INFO, logger="metaflow_hf.hub"):
        path = download_large_model("acme/model")
    assert read_tree(Path(path)) == files
    assert log.file_bytes() == sum(map(len, files.values()))
    fetched = [entry.path for entry in log.entries(method="GET") if "/resolve/" in entry.path]
    first_weights = next(i for i, path in enumerate(fetched) if path.endswith(".safetensors"))
    assert {path.rpartition("/")[2] for path in fetched[:first_weights]} == {
        "README.md",
        "config.json",
        "vocab.txt",
    }
    total = sum(map(len, files.values()))
    assert f"acme/model: 7 files, {total} bytes, 3 files of metadata first" in caplog.text
    assert "Downloaded acme/model@" in caplog.text


def test_a_wrong_large_model_fails_before_its_weights(own_hub):
    own_hub.faults.corrupt_next(100, path="*/config.json")
    with own_hub.log.new() as log, pytest.raises(IntegrityError):
        download_large_model("acme/model")
    assert log.count(path="*.safetensors") == 0


def test_a_large_model_takes_the_arguments_of_a_download(own_hub, tmp_path: Path, files):
    path = download_large_model("acme/model", local_dir=tmp_path / "big", ignore_patterns="*0000[2-4]-of-*")
    assert len(list(Path(path).rglob("*.safetensors"))) == 1
    with own_hub.log.new() as log:
        download_large_model("acme/model", force_download=True)
    assert log.file_bytes(path="*.safetensors") == 4 * 300_000


def test_production_is_published_whole(own_hub, read_tree, files, tmp_path: Path, monkeypatch):
    made = []
    new_work_dir = NodeCache.new_work_dir

    def recorded(*arguments, **keywords) -> Path:
        made.append(new_work_dir(*arguments, **keywords))
        return made[-1]

    monkeypatch.setattr(NodeCache, "new_work_dir", recorded)
    checked = []
    monkeypatch.setattr(Path, "replace", lambda self, to: checked.append(self) or os.replace(self, to))
    target = tmp_path / "models" / "acme" / "v1"
    assert production_download("acme/model", target) == str(target)
    # One rename of the staged directory beside it is all that readers see.
    assert checked[-1] == made[-1]
    assert made[-1].parent == target.parent
    assert read_tree(target) == files
    assert target.stat().st_mode & 0o777 == 0o755
    inode = target.stat().st_ino
    production_download("acme/model", target, required_files=["config.json", "*.safetensors"])
    assert target.stat().st_ino == inode
    assert [path.name for path in target.parent.iterdir()] == ["v1"]


def test_production_never_shows_a_part(own_hub, tmp_path: Path):
    target = tmp_path / "models" / "v1"
    with pytest.raises(SelectionError, match=r"lacks required files: pytorch_model\.bin"):
        production_download("acme/model", target, required_files=["pytorch_model.bin"])
    with pytest.raises(SelectionError, match="lacks required files: weights"):
        production_download("acme/model", target, allow_patterns="*.json")
    own_hub.faults.corrupt_next(100, path="*00004-of*")
    with pytest.raises(IntegrityError):
        production_download("acme/model", target)
    assert not target.parent.exists() or list(target.parent.iterdir()) == []


def test_what_production_holds_is_not_replaced(own_hub, tmp_path: Path):
    target = tmp_path / "v1"
    production_download("acme/model", target)
    (target / "config.json").write_text("edited")
    with pytest.raises(SelectionError, match="holds something else"):
        production_download("acme/model", target)
    assert (target / "config.json").read_text() == "edited"
    (tmp_path / "file").write_text("")
    with pytest.raises(SelectionError, match="holds something else"):
        production_download("acme/model", tmp_path / "file")


def test_a_publisher_killed_before_its_rename_leaves_nothing_for_long(
    own_hub, read_tree, files, tmp_path: Path
):
    target = tmp_path / "models" / "v1"
    code = (
        "import os, pathlib, sys; from metaflow_hf.hub import production_download\n"
        "replace = pathlib.Path.replace\n"
        "def killed(self, to):\n"
        "    os.kill(os.getpid(), 9) if str(to) == sys.argv[1] else None\n"
        "    return replace(self, to)\n"
        "pathlib.Path.replace = killed\n"
        "production_download('acme/model', sys.argv[1])\n"
    )
    environment = {**os.environ, "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(target)], env=environment, check=False, timeout=100
    )
    assert done.returncode == -signal.SIGKILL
    [staged] = target.parent.iterdir()
    assert staged.name != "v1"
    with own_hub.log.new() as log:
        production_download("acme/model", target)
    assert log.file_bytes() == 0
    assert read_tree(target) == files
    assert [path.name for path in target.parent.iterdir()] == ["v1"]


def test_two_publishers_of_one_directory_agree(own_hub, read_tree, files, tmp_path: Path):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: production_download("acme/model", tmp_path / "here" / "v1"), range(4)))
    assert read_tree(tmp_path / "here" / "v1") == files
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["v1"]


def test_the_scan_counts_shared_bytes_once(own_hub, files):
    snapshot_download("acme/model")
    snapshot_download("acme/model", allow_patterns="*.json")
    repo = own_hub.content.repo("acme/model")
    repo.commit({"config.json": b'{"changed": 1}'})
    snapshot_download("acme/model")
    own_hub.content.add("other/copy", files)
    snapshot_download("other/copy")
    info = scan_cache()
    size = sum(map(len, files.values()))
    assert info.size_on_disk == size + 14
    assert [(found.repo_id, found.repo_type) for found in info.repos] == [
        ("acme/model", "model"),
        ("other/copy", "model"),
    ]
    model = info.repos[0]
    assert model.size_on_disk == size + 14
    assert model.size_on_disk_str == info.size_on_disk_str == "1.2 MB"
    newest, oldest = model.revisions
    assert newest.commit_hash == repo.resolve().sha
    assert (oldest.selections, oldest.num_files, oldest.size_on_disk) == (2, 7, size)


def test_deleted_revisions_are_forgotten_and_downloaded_again_when_wanted(own_hub, files, read_tree):
    path = snapshot_download("acme/model")
    commit = own_hub.content.repo("acme/model").resolve().sha
    with pytest.raises(SelectionError, match="no snapshot of commit"):
        scan_cache().delete_revisions("f" * 40)
    deletion = scan_cache().delete_revisions(commit)
    assert deletion.expected_freed_size == sum(map(len, files.values()))
    assert deletion.execute() == 2
    store = datastore.configured_store()
    assert list(store.list("snapshots")) == list(store.list("manifests")) == []
    assert scan_cache().repos == ()
    with pytest.raises(NotFound):
        load_directory(store, f"snapshots/global/{deletion.keys[0].removeprefix('manifests/')}")
    assert snapshot_download("acme/model") == path
    assert read_tree(Path(path)) == files


@pytest.mark.parametrize("wants_xet", [False, True])
def test_a_model_is_pushed_and_comes_back(
    own_hub, read_tree, files, tmp_path: Path, monkeypatch, wants_xet: bool
):
    """Also to a hub that takes no Xet, by a process that would use it."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not wants_xet)
    path = snapshot_download("acme/model")
    reference = save_directory(
        datastore.configured_store(), path, flow="F", run="1", step="s", task="2", label="best"
    )
    for source in (reference, reference.to_json(), reference.key, path):
        info = push(source, "acme/mine", token="hf_owner", private=True)
    assert own_hub.content.repo("acme/mine").resolve().sha == info.oid
    back = snapshot_download("acme/mine", revision=info.oid, token="hf_owner", local_dir=tmp_path / "back")
    assert {name: data for name, data in read_tree(Path(back)).items() if name != ".gitattributes"} == files
    assert list((tmp_path / "node" / "work").iterdir()) == []


def test_a_directory_with_nothing_but_git_is_not_pushed(own_hub, tmp_path: Path):
    (tmp_path / "m" / ".git").mkdir(parents=True)
    (tmp_path / "m" / ".git" / "config").write_text("")
    with pytest.raises(SelectionError, match="nothing to push"):
        push(tmp_path / "m", "acme/mine", token="hf_owner")
    assert own_hub.content.find("acme/mine", "model") is None


def test_a_refused_push_says_which_token_it_needs(own_hub, tmp_path: Path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    with pytest.raises((HubUnavailable, GatedRepoError), match="token that may write there"):
        push(tmp_path / "m", "acme/mine", token="hf_friend")
    with pytest.raises(SelectionError, match="nothing to save"):
        push(tmp_path / "none", "acme/mine", token="hf_owner")
    with pytest.raises(NotFound):
        push("models/none/such/key/x/y.json", "acme/mine", token="hf_owner")


def test_datasets_are_found_by_modality(hub):
    text = search_datasets(modality="text", limit=None)
    assert "acme/parquet" in {found.repo_id for found in text}
    assert {found.training for found in text} == {"full"}
    assert [found.downloads for found in text] == sorted((found.downloads for found in text), reverse=True)
    [letters] = search_datasets(modality="document")
    assert (letters.repo_id, letters.training) == ("acme/scanned-letters", "text extraction needed")
    assert {found.training for found in search_datasets(modality="audio")} == {"browse and download only"}
    assert [found.repo_id for found in search_datasets("birdsong")] == ["acme/birdsong"]
    assert search_datasets("nothing-like-this") == []
    assert len(search_datasets(limit=3)) == 3
    for wrong in ({"modality": "smell"}, {"sort": "size"}):
        with pytest.raises(SelectionError, match="is none of"):
            search_datasets(**wrong)
    hub.faults.fail_next(100, status=403, path="/api/datasets*")
    with pytest.raises(HubUnavailable, match="refused"):
        search_datasets("x")
