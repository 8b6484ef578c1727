"""What is cached, when the hub is asked, and what a revision means."""

import logging
import os
from pathlib import Path

import pytest
from huggingface_hub.utils import close_session

from metaflow_hf.errors import HubUnavailable, SelectionError
from metaflow_hf.events import DownloadProgress
from metaflow_hf.store.manifests import read_manifest
from metaflow_hf.store.models import find_manifest

MODEL_BYTES = 4 * 300_000 + 100


def keys(store, prefix: str) -> list[str]:
    return [info.key for info in store.list(prefix)]


def test_a_snapshot_has_the_bytes_of_the_hub(
    own_hub, snapshots, request_for, read_tree, files, tmp_path: Path
):
    reference = snapshots().ensure(request_for())
    directory = snapshots().load(reference, tmp_path / "out")
    assert read_tree(directory) == files
    assert reference.num_files == len(files)
    assert reference.size == sum(map(len, files.values()))
    assert reference.commit_hash == own_hub.content.repo("acme/model").resolve().sha
    assert reference.revision == "main"
    assert reference.pathspec == "FlowX/1/start/7"


def test_nothing_but_the_files_is_stored_and_no_junk(own_hub, snapshots, request_for, store, cache):
    reference = snapshots().ensure(request_for())
    _, manifest = find_manifest(store, reference)
    assert {file.path for file in manifest.files} == set(own_hub.content.repo("acme/model").resolve().files)
    assert set(keys(store, "blobs")) == {file.blob for file in manifest.files}
    assert [path for path in (cache.root / "staging").rglob("*") if path.is_file()] == []


def test_within_a_run_the_hub_is_asked_once(own_hub, snapshots, request_for):
    snapshots().ensure(request_for())
    with own_hub.log.new() as log:
        for step in ("start", "train", "end"):
            snapshots(step=step).ensure(request_for())
    assert len(log) == 0


def test_the_next_run_resolves_again_and_downloads_nothing(own_hub, snapshots, request_for):
    snapshots().ensure(request_for())
    with own_hub.log.new() as log:
        snapshots(run="2").ensure(request_for())
    assert log.file_bytes() == 0
    assert log.count(path="*/tree/*") == 0
    assert log.count(path="*/revision/main") == 1
    assert log.count(path="*/auth-check") == 1


def test_a_moved_branch_is_seen_by_the_next_run_only(own_hub, snapshots, request_for):
    repo = own_hub.content.repo("acme/model")
    first = snapshots(run="1").ensure(request_for())
    new_commit = repo.commit({"config.json": b'{"changed": true}'})
    assert snapshots(run="1", step="later").ensure(request_for()).commit_hash == first.commit_hash
    assert snapshots(run="2").ensure(request_for()).commit_hash == new_commit


def test_a_resumed_run_keeps_the_commits_of_its_origin(own_hub, snapshots, request_for):
    first = snapshots(run="1").ensure(request_for())
    own_hub.content.repo("acme/model").commit({"config.json": b'{"changed": true}'})
    resumed = snapshots(run="2", origin_run="1").ensure(request_for())
    assert resumed.commit_hash == first.commit_hash


def test_all_tasks_of_a_run_get_the_commit_that_the_first_one_pinned(own_hub, snapshots, request_for):
    repo = own_hub.content.repo("acme/model")
    early, late = snapshots(run="1"), snapshots(run="1", step="other")
    first = early.resolve(request_for())
    repo.commit({"config.json": b'{"changed": true}'})
    assert late.resolve(request_for()).commit_hash == first.commit_hash


def test_one_commit_under_several_spellings_is_one_entry(own_hub, snapshots, request_for, store):
    repo = own_hub.content.repo("acme/model")
    repo.tag("v1")
    commit = repo.resolve().sha
    references = [
        snapshots().ensure(request_for(revision=revision)) for revision in ("main", "v1", commit, commit[:10])
    ]
    assert len({reference.key for reference in references}) == 1
    assert len(keys(store, "manifests")) == 1


def test_pull_requests_are_revisions(own_hub, snapshots, request_for):
    commit = own_hub.content.repo("acme/model").commit({"new.txt": b"x"}, branch="refs/pr/42")
    assert snapshots().ensure(request_for(revision="refs/pr/42")).commit_hash == commit


def test_a_changed_shard_is_all_that_a_new_revision_costs(
    own_hub, snapshots, request_for, store, read_tree, files, tmp_path
):
    repo = own_hub.content.repo("acme/model")
    snapshots(run="1").ensure(request_for())
    changed = b"new" + files["model-00002-of-00004.safetensors"][3:]
    repo.commit({"model-00002-of-00004.safetensors": changed})
    with own_hub.log.new() as log:
        reference = snapshots(run="2").ensure(request_for())
    assert log.file_bytes() == len(changed)
    assert len(keys(store, "blobs")) == len(files) + 1
    loaded = read_tree(snapshots().load(reference, tmp_path / "out"))
    assert loaded == {**files, "model-00002-of-00004.safetensors": changed}


def test_large_files_are_shared_between_repositories(own_hub, snapshots, request_for, files):
    own_hub.content.add("other/copy", files)
    snapshots().ensure(request_for())
    with own_hub.log.new() as log:
        snapshots().ensure(request_for("other/copy"))
    assert log.file_bytes(path="/lfs/*") == 0


def test_patterns_select_files_and_have_entries_of_their_own(own_hub, snapshots, request_for, store):
    json_only = snapshots().ensure(request_for(allow_patterns=["*.json"]))
    same = snapshots().ensure(request_for(allow_patterns=["*.json", "*.json"]))
    without = snapshots().ensure(request_for(ignore_patterns=["*.safetensors"]))
    assert [file.path for file in find_manifest(store, json_only)[1].files] == ["config.json"]
    assert same == json_only
    assert {file.path for file in find_manifest(store, without)[1].files} == {
        "README.md",
        "config.json",
        "tokenizer/vocab.txt",
    }
    assert without.key != json_only.key


def test_one_unmatched_pattern_is_fine_but_nothing_at_all_is_an_error(own_hub, snapshots, request_for, store):
    snapshots().ensure(request_for(allow_patterns=["*.json", "*.nothing"]))
    with pytest.raises(
        SelectionError, match=r"no file .* matches allow_patterns=\['\*\.nothing'\]"
    ) as caught:
        snapshots().ensure(request_for(allow_patterns=["*.nothing"]))
    assert "config.json" in str(caught.value)
    assert len(keys(store, "manifests")) == 1


def test_scopes_are_entries_over_one_manifest(own_hub, snapshots, request_for, store):
    references = [
        snapshots().ensure(request_for()),
        snapshots(step="other").ensure(request_for()),
        snapshots(namespace="").ensure(request_for()),
        snapshots(scope="flow").ensure(request_for()),
        snapshots(scope="global").ensure(request_for()),
        snapshots(run=None).ensure(request_for()),
    ]
    prefixes = [reference.key.partition("/127.0.0.1")[0] for reference in references]
    assert prefixes == [
        "snapshots/checkpoint/FlowX/start/user:tester",
        "snapshots/checkpoint/FlowX/other/user:tester",
        "snapshots/checkpoint/FlowX/start/_global",
        "snapshots/flow/FlowX",
        "snapshots/global",
        "snapshots/global",
    ]
    assert len(keys(store, "manifests")) == 1
    assert own_hub.log.count(path="*/tree/*") == 3  # one listing of seven files in pages of three


def test_an_unknown_scope_is_refused(snapshots):
    with pytest.raises(SelectionError, match="checkpoint, flow, global"):
        snapshots(scope="galaxy")


def test_force_download_brings_everything_again_and_renews_the_pin(own_hub, snapshots, request_for, files):
    snapshots().ensure(request_for())
    new_commit = own_hub.content.repo("acme/model").commit({"config.json": b"{}"})
    with own_hub.log.new() as log:
        forced = snapshots().ensure(request_for(force_download=True))
    assert forced.commit_hash == new_commit
    assert log.file_bytes() == sum(map(len, files.values())) - len(files["config.json"]) + len(b"{}")
    assert snapshots(step="later").ensure(request_for()).commit_hash == new_commit


def test_force_download_mends_a_damaged_blob(
    own_hub, snapshots, request_for, store, read_tree, files, tmp_path
):
    reference = snapshots().ensure(request_for())
    key, manifest = find_manifest(store, reference)
    store.put(manifest.files[2].blob, b"x" * manifest.files[2].size)
    snapshots().ensure(request_for(force_download=True))
    other_node = type(snapshots().cache)(tmp_path / "other-node")
    assert read_tree(snapshots(cache=other_node).load(reference, tmp_path / "out")) == files
    assert read_manifest(store, key) == manifest


def test_a_renamed_repository_is_followed(own_hub, snapshots, request_for):
    own_hub.content.rename("acme/model", "acme/renamed")
    assert snapshots().ensure(request_for("acme/model")).num_files == 7


def test_offline_uses_what_was_recorded_and_says_how_old_it_is(
    own_hub, snapshots, request_for, monkeypatch, caplog
):
    first = snapshots().ensure(request_for())
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with own_hub.log.new() as log, caplog.at_level(logging.WARNING, logger="metaflow_hf.hub"):
        offline = snapshots(run="2").ensure(request_for())
    assert offline.commit_hash == first.commit_hash
    assert len(log) == 0
    assert "less than a minute ago" in caplog.text


def test_offline_without_a_record_is_a_clear_error(own_hub, snapshots, request_for, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubUnavailable, match="never resolved from this datastore"):
        snapshots().ensure(request_for())


def test_offline_what_was_not_selected_before_is_a_clear_error(own_hub, snapshots, request_for, monkeypatch):
    snapshots().ensure(request_for(allow_patterns="*.json"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubUnavailable, match="not cached"):
        snapshots().ensure(request_for())


def test_offline_a_full_commit_is_known_by_whatever_revision_named_it(
    own_hub, snapshots, request_for, monkeypatch
):
    first = snapshots().ensure(request_for())
    gated = snapshots().ensure(request_for("acme/gated", token="hf_friend"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with own_hub.log.new() as log:
        again = snapshots(run="2", step="other").ensure(request_for(revision=first.commit_hash))
        same_scope = snapshots(run="3").ensure(request_for("acme/gated", revision=gated.commit_hash))
        with pytest.raises(HubUnavailable, match="private or gated"):
            snapshots(run="4", step="other").ensure(request_for("acme/gated", revision=gated.commit_hash))
        with pytest.raises(HubUnavailable, match="never resolved"):
            snapshots(run="5").ensure(request_for(revision="0" * 40))
    assert again.digest == first.digest
    assert same_scope.key == gated.key
    assert len(log) == 0


@pytest.fixture
def filled_cache(own_hub) -> Path:
    """huggingface_hub's cache as an image brings it: `acme/model` is whole, and the hub is gone."""
    from huggingface_hub import snapshot_download

    cache = Path(os.environ["HF_HUB_CACHE"])
    snapshot_download("acme/model", endpoint=own_hub.url, cache_dir=cache)
    return cache


@pytest.mark.parametrize("how", ["offline", "out of reach"])
def test_without_network_a_pre_filled_cache_is_used(
    own_hub, filled_cache, snapshots, request_for, read_tree, files, tmp_path, monkeypatch, caplog, how
):
    commit = own_hub.content.repo("acme/model").resolve().sha
    if how == "offline":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    else:
        own_hub.close()
        close_session()
    with own_hub.log.new() as log, caplog.at_level(logging.WARNING, logger="metaflow_hf.hub"):
        reference = snapshots().ensure(request_for())
        by_commit = snapshots(run="2").ensure(request_for(revision=commit, allow_patterns="*.json"))
    assert len(log) == 0
    assert reference.commit_hash == by_commit.commit_hash == commit
    assert "huggingface_hub's cache said less than a minute ago" in caplog.text
    assert read_tree(snapshots().load(reference, tmp_path / "out")) == files


def test_without_network_what_is_missing_or_damaged_in_a_pre_filled_cache_is_said(
    own_hub, filled_cache, snapshots, request_for, store, monkeypatch
):
    blobs = filled_cache / "models--acme--model" / "blobs"
    oid = own_hub.content.repo("acme/model").resolve().files["config.json"].oid
    (blobs / oid).write_bytes(b"x" * (blobs / oid).stat().st_size)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubUnavailable, match=r"'config\.json'.*or is damaged there"):
        snapshots().ensure(request_for())
    with pytest.raises(HubUnavailable, match="never resolved"):
        snapshots().ensure(request_for(revision="v9"))
    with pytest.raises(HubUnavailable, match="not cached"):
        snapshots().ensure(request_for(force_download=True, revision="main"))
    assert keys(store, "manifests") == keys(store, "snapshots") == []
    assert snapshots().ensure(request_for(ignore_patterns="config.json")).num_files == 6


def test_what_a_pre_filled_cache_gave_offline_is_listed_again_by_the_hub(
    own_hub, filled_cache, snapshots, request_for, monkeypatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    offline = snapshots().ensure(request_for())
    monkeypatch.delenv("HF_HUB_OFFLINE")
    new_commit = own_hub.content.repo("acme/model").commit({"config.json": b"{}"})
    with own_hub.log.new() as log:
        assert snapshots().ensure(request_for()).commit_hash == offline.commit_hash
        assert snapshots(run="2").ensure(request_for()).commit_hash == new_commit
    assert log.file_bytes() == len(b"{}")


def test_a_hub_out_of_reach_is_replaced_by_the_record(own_hub, snapshots, request_for, caplog):
    first = snapshots().ensure(request_for())
    own_hub.close()
    close_session()
    with caplog.at_level(logging.WARNING, logger="metaflow_hf.hub"):
        again = snapshots(run="2").ensure(request_for())
    assert again.commit_hash == first.commit_hash
    assert "which the hub named" in caplog.text


def test_progress_ends_at_all_bytes(own_hub, snapshots, request_for, files):
    events: list[DownloadProgress] = []
    snapshots(on_event=events.append).ensure(request_for())
    total = sum(map(len, files.values()))
    assert {event.total_bytes for event in events} == {total}
    assert events[-1].done_bytes == max(event.done_bytes for event in events) == total
