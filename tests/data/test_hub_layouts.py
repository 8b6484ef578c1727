"""Which files of a repository are read, asked of a hub: scripts, licences, slices, converted branches."""

import functools
import io
import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from metaflow_hf.data import build_blocks, open_rows
from metaflow_hf.data.sharded import ShardedDataset
from metaflow_hf.data.sources import open_source
from metaflow_hf.data.sources.hub import HubLocation
from metaflow_hf.demo.content import HubContent
from metaflow_hf.errors import HubUnavailable, SelectionError
from metaflow_hf.hub.client import HubClient, RetryPolicy
from metaflow_hf.store import open_store


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    retry = RetryPolicy(attempts=2, seconds=2.0, first_wait_seconds=0.01, max_wait_seconds=0.02)
    monkeypatch.setattr("metaflow_hf.data.sources.hub.HubClient", functools.partial(HubClient, retry=retry))


def _rows(name, count=10):
    return [{"text": f"{name} {i}", "n": i} for i in range(count)]


def _jsonl(name, count=10):
    return "".join(json.dumps(row) + "\n" for row in _rows(name, count)).encode()


@pytest.fixture
def publish(start_hub):
    def publish(files, repo_id="acme/raw"):
        content = HubContent()
        content.add(repo_id, files, repo_type="dataset")
        return start_hub(content)

    return publish


SCRIPT = {"raw.py": b"import datasets\n", "README.md": b"# raw\n", "dataset_infos.json": b"{}"}


@pytest.mark.parametrize("more", [{}, {"data.bin": b"x"}, {"train.jsonl": _jsonl("a")}], ids=list)
@pytest.mark.parametrize("read", [open_rows, build_blocks])
def test_a_dataset_made_by_a_script_names_the_converted_branch(more, read, publish, tmp_path, monkeypatch):
    monkeypatch.setenv("METAFLOW_HF_CACHE", str(tmp_path / "cache"))
    publish({**SCRIPT, **more})
    with pytest.raises(SelectionError) as error:
        read("hf://acme/raw")
    assert str(error.value).endswith("use hf://acme/raw@refs/convert/parquet.")
    assert "\n" not in str(error.value)
    assert error.value.__cause__ is None


CONVERTED = "refs/convert/parquet"


def test_the_converted_branch_has_a_directory_for_each_configuration(start_hub, tmp_path):
    content = HubContent()
    content.add("acme/raw", SCRIPT, repo_type="dataset")
    tables = {
        f"{config}/{split}/0000.parquet": _parquet(f"{config} {split}")
        for config in ("english", "french")
        for split in ("train", "test")
    }
    repo = content.repo("acme/raw", repo_type="dataset")
    repo.commit({**tables, **dict.fromkeys(SCRIPT)}, branch=CONVERTED)
    start_hub(content)
    with pytest.raises(
        SelectionError,
        match=f"configurations: english, french. Name one: hf://acme/raw:CONFIGURATION@{CONVERTED}",
    ):
        open_rows(f"hf://acme/raw@{CONVERTED}")
    with pytest.raises(SelectionError, match="no configuration 'german', only english, french"):
        open_rows(f"hf://acme/raw:german@{CONVERTED}")
    assert list(open_rows(f"hf://acme/raw:french@{CONVERTED}")) == _rows("french train")
    assert list(open_rows(f"hf://acme/raw:english:test[:3]@{CONVERTED}")) == _rows("english test")[:3]
    # A plan for several machines pins the commit.
    plan = ShardedDataset.plan(f"hf://acme/raw:french@{CONVERTED}", samples_per_block=4)
    root = open_store(tmp_path / "out")
    plan.build([0], root)
    assert plan.assemble(root).total_samples == 10


def test_a_converted_branch_of_one_configuration(start_hub):
    content = HubContent()
    content.add("acme/raw", SCRIPT, repo_type="dataset")
    repo = content.repo("acme/raw", repo_type="dataset")
    repo.commit({"plain/train/0000.parquet": _parquet("a"), **dict.fromkeys(SCRIPT)}, branch=CONVERTED)
    start_hub(content)
    assert list(open_rows(f"hf://acme/raw@{CONVERTED}")) == _rows("a")


def _parquet(name):
    buffer = io.BytesIO()
    pa.parquet.write_table(pa.Table.from_pylist(_rows(name)), buffer)
    return buffer.getvalue()


def test_texts_about_the_dataset_are_no_rows(publish):
    publish(
        {"a.jsonl": _jsonl("a"), "LICENSE.txt": b"free\n", "requirements.txt": b"x\n", "CHANGES.txt": b"y\n"}
    )
    assert list(open_rows("hf://acme/raw")) == _rows("a")


@pytest.mark.parametrize(
    ("location", "split", "rows"),
    [
        ("hf://acme/raw::train[:25%]", None, ("train", 0, 5)),
        ("hf://acme/raw:default:test[2:4]", None, ("test", 2, 4)),
        ("hf://acme/raw", "train[-3:]", ("train", 17, 20)),
        ("hf://acme/raw::train", "test[5:]", ("test", 5, 10)),
    ],
)
def test_slices_of_the_hub(location, split, rows, publish, tmp_path):
    hub = publish(
        {
            "train-0.jsonl": b"".join(_jsonl("train", 20).splitlines(keepends=True)[:12]),
            "train-1.jsonl": b"\n".join([b"", *_jsonl("train", 20).splitlines()[12:]]),
            "test.jsonl": _jsonl("test"),
        }
    )
    name, first, stop = rows
    expected = _rows(name, 20)[first:stop]
    assert list(open_rows(location, split=split)) == expected
    opened = open_source(location, split=split)
    assert opened.source.startswith("hf://acme/raw:default:")
    # What a plan carries from machine to machine is the same slice again.
    assert open_source(f"{opened.source}@{opened.commit_hash}").source == opened.source
    # It is known without the hub; the files themselves are not.
    hub.faults.fail_next(1000, status=503)
    again = open_source(location, split=split)
    assert [file.rows for file in again.files] == [
        getattr(file, "rows", None) for file in open_source(location, split=split).files
    ]
    with pytest.raises(HubUnavailable):
        list(again.batches(_beginning()))


def _beginning():
    from metaflow_hf.data.manifest import Cursor

    return Cursor()


def test_a_slice_is_found_again_without_the_hub(publish, tmp_path, read_all):
    hub = publish({"train.jsonl": _jsonl("train", 20)})
    manifest = build_blocks("hf://acme/raw::train[50%:]", tmp_path / "out", samples_per_block=4)
    assert read_all(tmp_path / "out") == _rows("train", 20)[10:]
    hub.faults.fail_next(1000, status=503)
    assert build_blocks("hf://acme/raw::train[50%:]", tmp_path / "out", samples_per_block=4) == manifest


def test_options_of_a_configuration_are_known_without_the_hub(publish, tmp_path, read_all):
    readme = b"---\nconfigs:\n- config_name: default\n  data_files: a.csv\n  sep: ';'\n---\n"
    hub = publish({"README.md": readme, "a.csv": b"text;n\na,b;1\n"})
    manifest = build_blocks("hf://acme/raw", tmp_path / "out")
    assert read_all(tmp_path / "out") == [{"text": "a,b", "n": "1"}]
    hub.faults.fail_next(1000, status=503)
    assert build_blocks("hf://acme/raw", tmp_path / "out") == manifest
    assert [file.options.delimiter for file in open_source("hf://acme/raw").files] == [";"]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("hf://a/b:c:train[:10%]", ("a/b", "c", "train[:10%]", None)),
        ("hf://a/b::train[10:20]@main", ("a/b", None, "train[10:20]", "main")),
        (
            "hf://a/b:c:train[:1]+test@refs/convert/parquet",
            ("a/b", "c", "train[:1]+test", "refs/convert/parquet"),
        ),
    ],
)
def test_locations_of_slices(text, parts):
    location = HubLocation.parse(text)
    assert (location.repo_id, location.config, location.split, location.revision) == parts
