"""A source of which nothing can be stored is an error that says why, never a complete dataset of no rows."""

import json

import pytest

from metaflow_hf.data import BlockManager, build_blocks
from metaflow_hf.data.sharded import ShardedDataset
from metaflow_hf.errors import SelectionError
from metaflow_hf.store import open_store

EMPTY = [
    ("raw.jsonl", b"", "raw.jsonl holds no rows: there is nothing to store."),
    ("raw.json", b"[]", "raw.json holds no rows"),
    ("raw.csv", b"text,n\n", "raw.csv holds no rows"),
    ("raw.jsonl", b"\n \n\r\n", "3 skipped (3 blank)"),
    ("raw.txt", b"\n\n", "2 skipped (2 without text in column 'text')"),
    (
        "raw.jsonl",
        b'{"text": ""}\n\n{"text": null}\n{"text": " "}\n',
        "4 skipped (3 without text in column 'text', 1 blank)",
    ),
]


@pytest.mark.parametrize(("name", "data", "said"), EMPTY, ids=[said for *_, said in EMPTY])
def test_a_source_without_rows_says_why(name, data, said, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(SelectionError) as error:
        build_blocks(tmp_path / name, tmp_path / "out")
    assert said in str(error.value)
    assert not (tmp_path / "out/commits").exists()
    with (
        pytest.raises(SelectionError, match="holds no rows"),
        BlockManager(tmp_path / name, cache_dir=tmp_path / "c") as blocks,
    ):
        blocks.wait_complete()


def test_rows_that_were_all_skipped_are_counted_by_reason(tmp_path):
    rows = [{"text": "é"}, {"text": ""}, {"text": 5}, {"text": "ü"}]
    (tmp_path / "raw.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(SelectionError) as error:
        build_blocks(tmp_path / "raw.jsonl", tmp_path / "out", ascii_only=True, on_bad_row="skip")
    assert "4 skipped (2 not ASCII, 1 without text in column 'text', 1 bad)" in str(error.value)
    assert "raw.jsonl: row 2 (line 3), column 'text' holds int" in str(error.value)


@pytest.mark.parametrize("num_proc", [1, 2])
def test_a_file_without_rows_among_others_is_no_error(num_proc, tmp_path, read_all):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/a.jsonl").write_bytes(b"")
    (tmp_path / "raw/b.jsonl").write_bytes(b'{"text": "b"}\n')
    build_blocks(tmp_path / "raw", tmp_path / "out", num_proc=num_proc)
    assert read_all(tmp_path / "out") == [{"text": "b"}]
    plan = ShardedDataset.plan(tmp_path / "raw", samples_per_block=10)
    root = open_store(tmp_path / "shards")
    plan.build([0, 1], root)
    assert plan.assemble(root).total_samples == 1


def test_shards_that_are_all_empty(tmp_path):
    (tmp_path / "raw").mkdir()
    for name in ("a", "b"):
        (tmp_path / f"raw/{name}.jsonl").write_bytes(b'{"text": ""}\n')
    plan = ShardedDataset.plan(tmp_path / "raw", samples_per_block=10)
    root = open_store(tmp_path / "shards")
    plan.build([0, 1], root)
    with pytest.raises(SelectionError, match="holds no rows that can be stored: 2 were skipped"):
        plan.assemble(root)


def test_a_limit_that_no_row_fits_is_no_empty_source(tmp_path):
    (tmp_path / "raw.jsonl").write_bytes(b'{"text": "long"}\n')
    assert build_blocks(tmp_path / "raw.jsonl", tmp_path / "out", max_bytes=1).total_samples == 0
