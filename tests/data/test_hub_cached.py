"""Datasets of the hub that are cached: by reference, and by name while the hub cannot be asked."""

import functools
import logging

import pytest

from metaflow_hf.data import BlockManager, build_blocks, detect_format
from metaflow_hf.data.sources import remembered as remembered_module
from metaflow_hf.errors import FormatError, HubUnavailable, IntegrityError, SelectionError
from metaflow_hf.hub.client import HubClient, RetryPolicy
from metaflow_hf.hub.request import SnapshotRequest
from metaflow_hf.hub.snapshots import Snapshots
from metaflow_hf.store import datastore, open_store
from metaflow_hf.store.node_cache import NodeCache
from metaflow_hf_cli.fixtures import OWNER, PICKLE_ONLY_ID, fixture_content
from metaflow_hf_cli.fixtures import datasets as given


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    retry = RetryPolicy(attempts=2, seconds=5.0, first_wait_seconds=0.01, max_wait_seconds=0.02)
    monkeypatch.setattr("metaflow_hf.data.sources.hub.HubClient", functools.partial(HubClient, retry=retry))


@pytest.fixture(autouse=True)
def _flow(tmp_path, monkeypatch):
    """As in a task of a flow: everything goes to its datastore."""
    monkeypatch.setattr(datastore, "_active", ("local", str(tmp_path / "datastore")))


@pytest.fixture
def cache_snapshot(tmp_path):
    def cache(repo_id, **arguments):
        request = SnapshotRequest.of(repo_id, repo_type=arguments.pop("repo_type", "dataset"), **arguments)
        return Snapshots(datastore.configured_store(), NodeCache.default()).ensure(request)

    return cache


@pytest.fixture(params=["offline", "unreachable"])
def without_hub(request, hub, monkeypatch):
    def leave():
        if request.param == "offline":
            monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        else:
            hub.faults.fail_next(10_000, status=503)
        hub.log.clear()

    return leave


def test_a_finished_dataset_is_found_again_without_the_hub(without_hub, hub, tmp_path, caplog):
    location = f"hf://{given.PARQUET_ID}"
    online = build_blocks(location, samples_per_block=50)
    without_hub()
    with caplog.at_level(logging.WARNING):
        assert build_blocks(location, samples_per_block=50) == online
    assert "less than a minute ago" in caplog.text
    assert str(online.commit_hash)[:12] in caplog.text
    with BlockManager(location, samples_per_block=50) as manager:
        assert manager.get_chunk(0, 0)[0] == given.rows(1)[0]["text"]
    assert hub.log.file_bytes() == 0


def test_a_cached_snapshot_is_read_without_the_hub(without_hub, hub, tmp_path, cache_snapshot, read_all):
    cache_snapshot(given.CONFIGS_ID)
    without_hub()
    for location, seed, count in (("", 6, 240), (":french", 7, 60), ("::validation", 106, 30)):
        manifest = build_blocks(f"hf://{given.CONFIGS_ID}{location}", tmp_path / f"out{seed}")
        assert read_all(tmp_path / f"out{seed}") == given.rows(seed, count)
    with pytest.raises(SelectionError, match="no configuration 'german', only english, french"):
        build_blocks(f"hf://{given.CONFIGS_ID}:german", tmp_path / "out")
    assert manifest.commit_hash is not None
    assert hub.log.file_bytes() == 0


def test_what_was_begun_and_is_not_cached_waits_for_the_hub(without_hub, hub, tmp_path, read_all):
    location = f"hf://{given.GZIP_ID}"
    hub.faults.fail_next(1000, status=503, path="*train-00001*")
    with pytest.raises(HubUnavailable):
        build_blocks(location, tmp_path / "out", samples_per_block=50)
    hub.faults.clear()
    without_hub()
    with pytest.raises(HubUnavailable):
        build_blocks(location, tmp_path / "out", samples_per_block=50)
    assert len(list((tmp_path / "out/commits").iterdir())) == 2


def test_what_was_never_seen_is_the_hubs_own_error(without_hub, tmp_path):
    without_hub()
    with pytest.raises(HubUnavailable, match=given.CSV_ID):
        build_blocks(f"hf://{given.CSV_ID}", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_private_dataset_is_found_again_by_who_built_it_only(without_hub, hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", OWNER)
    location = f"hf://{given.PRIVATE_DATASET_ID}"
    online = build_blocks(location)
    without_hub()
    assert build_blocks(location) == online
    monkeypatch.setattr(datastore, "_active", ("local", str(tmp_path / "another")))
    with pytest.raises(HubUnavailable):
        build_blocks(location)


def test_what_is_remembered_holds_no_text_no_token_and_no_address(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", OWNER)
    build_blocks(f"hf://{given.CHAT_ID}", tmp_path / "out")
    records = list((tmp_path / "datastore/mf.hf/sources").rglob("*.json"))
    assert len(records) == 2
    text = "".join(record.read_text() for record in records)
    assert all(word not in text for word in (OWNER, hub.url, "Say:", str(tmp_path)))


@pytest.mark.parametrize("form", ["reference", "dict"])
def test_a_reference_gives_the_blocks_of_its_commit(form, start_hub, tmp_path, cache_snapshot, read_all):
    content = fixture_content()
    hub = start_hub(content)
    build_blocks(f"hf://{given.PARQUET_ID}", tmp_path / "hub", samples_per_block=50)
    reference = cache_snapshot(given.PARQUET_ID)
    content.repo(given.PARQUET_ID, repo_type="dataset").commit(
        {"data/train-00000-of-00002.parquet": b"moved on"}
    )
    hub.log.clear()
    source = reference if form == "reference" else reference.to_json()
    manifest = build_blocks(source, tmp_path / "ref", samples_per_block=50)
    assert read_all(tmp_path / "ref") == given.rows(1)
    with BlockManager(source, samples_per_block=50) as manager:
        assert manager.get_chunk(4, 0)[-1] == given.rows(1)[-1]["text"]
    # The same content has the same key, so that nothing is built twice.
    assert manifest == build_blocks(source, tmp_path / "hub", samples_per_block=50)
    assert len(hub.log) == 0


def test_a_reference_to_a_part_is_another_dataset(hub, tmp_path, cache_snapshot):
    whole = build_blocks(cache_snapshot(given.GZIP_ID), tmp_path / "whole")
    part = build_blocks(cache_snapshot(given.GZIP_ID, allow_patterns="*00000*"), tmp_path / "part")
    assert (whole.total_samples, part.total_samples) == (240, 120)
    assert whole.spec_digest != part.spec_digest


def test_a_reference_to_something_else_is_refused(hub, tmp_path, cache_snapshot):
    with pytest.raises(SelectionError, match="reference to a model"):
        build_blocks(cache_snapshot(PICKLE_ONLY_ID, repo_type="model"), tmp_path / "out")
    with pytest.raises(SelectionError, match="not a reference"):
        build_blocks({"no": "reference"}, tmp_path / "out")


def test_a_damaged_blob_is_named(hub, tmp_path, cache_snapshot):
    reference = cache_snapshot(given.CHAT_ID)
    blob = max(
        (tmp_path / "datastore/mf.hf/blobs").rglob("*"),
        key=lambda path: path.stat().st_size if path.is_file() else 0,
    )
    blob.write_bytes(blob.read_bytes().replace(b"Say", b"say", 1))
    with pytest.raises(IntegrityError, match="train-00000"):
        build_blocks(reference, tmp_path / "out")
    assert not (tmp_path / "out/commits/complete.json").exists()
    assert open_store(tmp_path / "out").children("commits") == []


@pytest.mark.parametrize(
    "row",
    [
        {
            "messages": '[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]',
            "id": "1",
        },
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}], "source": "s"},
        {"instruction": "i", "input": "", "output": "o", "text": "i\no"},
        {"id": "1", "translation": {"de": "ja", "fr": "oui"}},
        {"image": {"bytes": "", "path": "a.png"}, "caption": "c"},
        {"prompt": "p", "completion": "c", "label": True},
        {"text": "", "title": "t"},
    ],
)
def test_what_is_remembered_of_rows_has_their_format_and_none_of_their_words(row):
    def outcome(rows):
        try:
            return detect_format(rows)
        except FormatError as error:
            return str(error).partition(" Columns: ")[0]

    remembered = {name: remembered_module._example(value) for name, value in row.items()}
    assert outcome([remembered]) == outcome([row])
    assert "yes" not in str(remembered)
