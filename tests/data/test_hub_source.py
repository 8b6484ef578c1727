"""Datasets of a hub, streamed at one commit: all formats, configurations and splits, faults and wrong names."""

import functools
import gzip
import io
import json
import zipfile

import msgspec
import pytest

from metaflow_hf import environment
from metaflow_hf.data import BlockManager, build_blocks
from metaflow_hf.data.build import plan_dataset, write_dataset
from metaflow_hf.data.sources import open_source
from metaflow_hf.data.sources.hub import HubLocation
from metaflow_hf.data.sources.layout import layout_of_files
from metaflow_hf.demo.content import HubContent
from metaflow_hf.errors import (
    ConfigError,
    DatasetMismatch,
    GatedRepoError,
    HubUnavailable,
    IntegrityError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SelectionError,
    UnsupportedModalityError,
)
from metaflow_hf.hub.client import HubClient, RetryPolicy
from metaflow_hf.store import open_store
from metaflow_hf_cli.fixtures import OWNER, fixture_content
from metaflow_hf_cli.fixtures import datasets as given


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    """Retries almost without waiting."""
    retry = RetryPolicy(attempts=3, seconds=5.0, first_wait_seconds=0.01, max_wait_seconds=0.02)
    monkeypatch.setattr("metaflow_hf.data.sources.hub.HubClient", functools.partial(HubClient, retry=retry))


@pytest.mark.parametrize(
    ("location", "seed", "count"),
    [
        (given.PARQUET_ID, 1, 240),
        (f"{given.PARQUET_ID}:default:test", 101, 30),
        (given.GZIP_ID, 2, 240),
        (given.CONFIGS_ID, 6, 240),
        (f"{given.CONFIGS_ID}:english:validation", 106, 30),
        (f"{given.CONFIGS_ID}:french", 7, 60),
        (f"{given.CONFIGS_ID}:french:train@main", 7, 60),
    ],
)
def test_every_format_configuration_and_split(location, seed, count, hub, tmp_path, read_all):
    manifest = build_blocks(f"hf://{location}", tmp_path / "out", samples_per_block=50)
    assert read_all(tmp_path / "out") == given.rows(seed, count)
    assert manifest.total_samples == count
    assert manifest.commit_hash is not None
    assert len(manifest.commit_hash) == 40


def test_csv_and_text(hub, tmp_path, read_all):
    build_blocks(f"hf://{given.CSV_ID}", tmp_path / "csv")
    assert read_all(tmp_path / "csv") == [
        {"id": str(row["id"]), "text": row["text"]} for row in given.rows(3)
    ]
    build_blocks(f"hf://{given.PLAIN_TEXT_ID}", tmp_path / "txt")
    assert [row["text"] for row in read_all(tmp_path / "txt")] == [row["text"] for row in given.rows(4)]


def test_conversations_keep_their_messages(hub, tmp_path, read_all):
    manifest = build_blocks(f"hf://{given.CHAT_ID}", tmp_path / "out")
    assert manifest.text_column == "messages"
    assert read_all(tmp_path / "out")[0]["messages"][1] == {
        "role": "assistant",
        "content": given.rows(5)[0]["text"],
    }


def test_rows_without_text_never_end_the_dataset(hub, tmp_path, read_all):
    manifest = build_blocks(f"hf://{given.BLANK_ROWS_ID}", tmp_path / "out", samples_per_block=20)
    assert manifest.total_samples + manifest.skipped_rows == given.NUM_ROWS
    assert read_all(tmp_path / "out")[-1]["id"] == given.rows(8)[-1]["id"]


def test_a_name_of_one_part_that_was_renamed(hub, tmp_path):
    assert build_blocks(f"hf://{given.ONE_PART_ID}", tmp_path / "out").total_samples == 240


def test_a_manager_reads_while_the_hub_still_sends(hub, tmp_path):
    gate = hub.faults.hold_next(path="*train-00001-of-00002*")
    with BlockManager(
        f"hf://{given.GZIP_ID}", samples_per_block=50, dataset_chunk_size=25, cache_dir=tmp_path
    ) as manager:
        assert manager.get_chunk(1, 1) == [row["text"] for row in given.rows(2)[75:100]]
        assert gate.wait_until_held()
        assert not manager.manifest.is_complete
        gate.open()
        assert manager.get_total_blocks() == 5
    hub.log.clear()
    with BlockManager(
        f"hf://{given.GZIP_ID}", samples_per_block=50, dataset_chunk_size=25, cache_dir=tmp_path
    ) as manager:
        assert manager.manifest.is_complete


def test_the_branch_may_move_while_the_dataset_is_streamed(start_hub, tmp_path, read_all):
    content = fixture_content()
    start_hub(content)
    location = f"hf://{given.CONFIGS_ID}:french"
    source = open_source(location)
    content.repo(given.CONFIGS_ID, repo_type="dataset").commit({"french/train.jsonl": b'{"text":"moved"}\n'})
    store = open_store(tmp_path / "before")
    write_dataset(source, plan_dataset(source, samples_per_block=100), store)
    assert read_all(tmp_path / "before") == given.rows(7, 60)
    build_blocks(location, tmp_path / "after")
    assert read_all(tmp_path / "after") == [{"text": "moved"}]
    with pytest.raises(DatasetMismatch, match="commit_hash"):
        build_blocks(location, tmp_path / "before", samples_per_block=100)


def test_archives_of_the_hub(start_hub, tmp_path, read_all):
    rows = given.rows(3, 120)
    lines = [json.dumps(row).encode() + b"\n" for row in rows]
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as files:
        files.writestr("b.jsonl", b"".join(lines[70:]))
        files.writestr("a.jsonl", b"".join(lines[:70]))
    content = HubContent()
    content.add("acme/archive", {"data.zip": archive.getvalue()}, repo_type="dataset")
    content.add("acme/lines", {"train.jsonl.zip": archive.getvalue()}, repo_type="dataset")
    start_hub(content)
    for repo_id in ("acme/archive", "acme/lines"):
        build_blocks(f"hf://{repo_id}", tmp_path / repo_id, samples_per_block=50)
        assert read_all(tmp_path / repo_id) == rows


@pytest.mark.parametrize("kind", ["status", "drop", "truncate", "corrupt"])
def test_faults_of_the_hub_change_nothing(kind, hub, tmp_path, read_all):
    for path in ("*train-00000*", "*train-00001*"):
        if kind == "status":
            hub.faults.fail_next(2, status=503, path=path)
        elif kind == "drop":
            hub.faults.drop_next(2, path=path)
        elif kind == "truncate":
            hub.faults.truncate_next(2, after_bytes=100, path=path)
        else:
            hub.faults.corrupt_next(2, path=path)
    build_blocks(f"hf://{given.PARQUET_ID}", tmp_path / "out", samples_per_block=50)
    assert read_all(tmp_path / "out") == given.rows(1)


def test_wrong_bytes_that_keep_coming_are_an_error(hub, tmp_path):
    hub.faults.corrupt_next(1000, path="*train-0000*")
    with pytest.raises(IntegrityError, match="train-0000"):
        build_blocks(f"hf://{given.PARQUET_ID}", tmp_path / "out")


@pytest.mark.parametrize("repo_id", [given.PARQUET_ID, given.GZIP_ID])
def test_an_outage_is_raised_and_the_next_build_goes_on_where_it_stopped(repo_id, hub, tmp_path, read_all):
    hub.faults.fail_next(1000, status=503, path="*train-00001*")
    with pytest.raises(HubUnavailable, match="train-00001"):
        build_blocks(f"hf://{repo_id}", tmp_path / "out", samples_per_block=30)
    hub.faults.clear()
    hub.log.clear()
    manifest = build_blocks(f"hf://{repo_id}", tmp_path / "out", samples_per_block=30)
    assert manifest.is_complete
    assert read_all(tmp_path / "out") == given.rows(1 if repo_id == given.PARQUET_ID else 2)
    build_blocks(f"hf://{repo_id}", tmp_path / "whole", samples_per_block=30)
    for name in (
        "blocks/block_00003.jsonl",
        "blocks/block_00007.idx",
        "block_manifest.json",
        "commits/00005.json",
    ):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz"])
@pytest.mark.parametrize("fault", ["status", "drop", "truncate"])
def test_an_outage_in_the_middle_downloads_no_finished_file_again(
    fault, ending, start_hub, tmp_path, read_all
):
    rows = given.rows(1, 400)
    shards = [
        b"".join(msgspec.json.encode(row) + b"\n" for row in rows[at : at + 100]) for at in range(0, 400, 100)
    ]
    if ending == "jsonl.gz":
        shards = [gzip.compress(shard, mtime=0) for shard in shards]
    content = HubContent()
    content.add(
        "acme/shards",
        lambda: {f"data/train-{n:05d}-of-00004.{ending}": shard for n, shard in enumerate(shards)},
        repo_type="dataset",
    )
    hub = start_hub(content)
    schedule = {
        "status": hub.faults.fail_next,
        "drop": hub.faults.drop_next,
        "truncate": hub.faults.truncate_next,
    }
    schedule[fault](1000, path="*train-00002*")
    with pytest.raises((HubUnavailable, IntegrityError), match="train-00002"):
        build_blocks("hf://acme/shards", tmp_path / "out", samples_per_block=70)
    hub.faults.clear()
    with hub.log.new() as log:
        build_blocks("hf://acme/shards", tmp_path / "out", samples_per_block=70)
    # The last commit lies in the second file; the first is finished.
    assert log.file_bytes("*train-00000*") == 0
    assert log.file_bytes("*train-00003*") == len(shards[3])
    assert read_all(tmp_path / "out") == rows


def test_a_hub_that_is_gone_is_an_outage(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubUnavailable, match="127.0.0.1:9"):
        build_blocks(f"hf://{given.PARQUET_ID}", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("location", "error", "named"),
    [
        ("acme/no-such-dataset", RepositoryNotFoundError, "no-such-dataset"),
        (f"{given.PARQUET_ID}@no-such-branch", RevisionNotFoundError, "no-such-branch"),
        (
            f"{given.CONFIGS_ID}:german",
            SelectionError,
            f"^hf://{given.CONFIGS_ID}: there is no configuration 'german', only english, french. Name one: "
            f"hf://{given.CONFIGS_ID}:CONFIGURATION.$",
        ),
        (f"{given.CONFIGS_ID}:french:dev", SelectionError, "train"),
        (given.GATED_DATASET_ID, GatedRepoError, "gated"),
        (given.PRIVATE_DATASET_ID, RepositoryNotFoundError, "private"),
        ("acme/photos", UnsupportedModalityError, "photos.*holds image data.*only text"),
        ("acme/speech", UnsupportedModalityError, "audio"),
        ("no:such:thing:at:all", SelectionError, "write hf://"),
        ("../etc", SelectionError, "not the id"),
    ],
)
def test_what_cannot_be_read_is_one_clear_error_and_writes_nothing(location, error, named, hub, tmp_path):
    with pytest.raises(error, match=named):
        build_blocks(f"hf://{location}", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dataset_of_several_configurations_and_no_default_lists_them(start_hub, tmp_path):
    header = "---\nconfigs:\n" + "".join(
        f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("english", "french")
    )
    files = {f"{name}.jsonl": b'{"text":"a"}\n' for name in ("english", "french")}
    content = HubContent()
    content.add("acme/two", {"README.md": f"{header}---\n".encode(), **files}, repo_type="dataset")
    start_hub(content)
    with pytest.raises(SelectionError, match="^hf://acme/two has several configurations: english, french. "):
        build_blocks("hf://acme/two", tmp_path / "out")


def test_an_unknown_text_column_lists_the_columns_before_anything_is_written(hub, tmp_path):
    with pytest.raises(ConfigError, match=r"'txet'.*id .*text"):
        build_blocks(f"hf://{given.PARQUET_ID}", tmp_path / "out", text_column="txet")
    assert not (tmp_path / "out").exists()


def test_a_private_dataset_is_read_with_a_token_that_is_stored_nowhere(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", OWNER)
    manifest = build_blocks(f"hf://{given.PRIVATE_DATASET_ID}", tmp_path / "out", samples_per_block=100)
    assert manifest.total_samples == given.NUM_ROWS
    stored = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert OWNER.encode() not in stored
    assert environment.hub_endpoint().encode() not in stored


def test_nothing_but_the_rows_themselves_is_downloaded_twice(hub, tmp_path):
    build_blocks(f"hf://{given.GZIP_ID}", tmp_path / "out")
    hub.log.clear()
    build_blocks(f"hf://{given.GZIP_ID}", tmp_path / "out")
    bodies = [entry for entry in hub.log.entries() if entry.is_file and "train" in entry.path]
    assert not bodies


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("hf://imdb", ("imdb", None, None, None)),
        ("hf://a/b", ("a/b", None, None, None)),
        ("hf://a/b:c", ("a/b", "c", None, None)),
        ("hf://a/b:c:d@refs/pr/1", ("a/b", "c", "d", "refs/pr/1")),
        ("hf://a/b::d", ("a/b", None, "d", None)),
        ("hf://a/b@main", ("a/b", None, None, "main")),
        ("hf://datasets/a/b", ("a/b", None, None, None)),
    ],
)
def test_locations(text, parts):
    location = HubLocation.parse(text)
    assert (location.repo_id, location.config, location.split, location.revision) == parts


@pytest.mark.parametrize(
    "name", ["train.xml", "train.hdf5", "data/train.webp", "train.jsonl.bak", "task.toml"]
)
def test_files_without_rows_of_text_are_refused_with_what_to_do(name):
    with pytest.raises(SelectionError, match="has no files with rows of text") as refused:
        layout_of_files([name, "README.md"], {}, None, None, where="hf://org/name")
    for named in (name, ".parquet", "hf://org/name@refs/convert/parquet", "save_to_disk"):
        assert named in str(refused.value)
