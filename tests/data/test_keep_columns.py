"""``keep_columns``: which columns are stored beside the text."""

import json

import datasets
import pytest

from metaflow_hf.config import DataConfig
from metaflow_hf.data import BlockManager, build_blocks
from metaflow_hf.data.build import dataset_key
from metaflow_hf.data.manifest import DatasetSpec
from metaflow_hf.errors import ConfigError
from metaflow_hf.store import open_store
from metaflow_hf.train.blocks import build_source

ROWS = [{"n": i, "text": f"row {i}", "score": i / 3, "tags": ["a", str(i)], "raw": "x"} for i in range(2500)]
KINDS = ["jsonl", "jsonl odd", "json", "csv", "parquet", "save_to_disk"]


def _write(kind, path):
    if kind == "parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(path / "rows.parquet")
        return path / "rows.parquet"
    if kind == "save_to_disk":
        datasets.Dataset.from_list(ROWS).save_to_disk(path / "rows")
        return path / "rows"
    ending = kind.partition(" ")[0]
    place = path / f"rows.{ending}"
    lines = list(map(json.dumps, ROWS))
    if kind == "jsonl odd":
        # A line that is not decoded together with the others.
        lines[7] = '{"text": "row 7", "n": 7, "score": NaN, "raw": "\\ud800"}'
    if kind == "csv":
        datasets.Dataset.from_list(ROWS).remove_columns("tags").to_csv(place)
    else:
        place.write_text("[" + ",".join(lines) + "]" if kind == "json" else "\n".join(lines))
    return place


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_proc", [1, 2])
def test_only_these_columns_and_the_text_are_stored(kind, num_proc, tmp_path, read_all, caplog):
    source = _write(kind, tmp_path)
    build_blocks(source, tmp_path / "out", keep_columns=["n"], num_proc=num_proc, samples_per_block=700)
    rows = read_all(tmp_path / "out")
    expected = [{"n": str(row["n"]) if kind == "csv" else row["n"], "text": row["text"]} for row in ROWS]
    assert [dict(sorted(row.items())) for row in rows] == expected
    # What is not to be stored is not missed.
    assert "left out" not in caplog.text


def test_values_are_kept_as_written(tmp_path):
    (tmp_path / "raw.jsonl").write_bytes(
        b'{"b": 1.10, "text": "\\u00e9", "n": 123456789012345678901234567890}\n'
    )
    build_blocks(tmp_path / "raw.jsonl", tmp_path / "out", keep_columns=["n", "text"])
    stored = (tmp_path / "out/blocks/block_00000.jsonl").read_bytes()
    assert stored == b'{"text":"\\u00e9","n":123456789012345678901234567890}\n'


def test_no_columns_are_the_text_alone(tmp_path, write_jsonl, read_all):
    build_blocks(write_jsonl(ROWS[:3]), tmp_path / "out", keep_columns=[])
    assert read_all(tmp_path / "out") == [{"text": row["text"]} for row in ROWS[:3]]


@pytest.mark.parametrize(
    ("columns", "said"), [(["n", "nn"], "no column 'nn'.*n, text, score"), ("n", "a list")]
)
def test_a_column_that_is_not_there_is_refused_before_anything_is_written(
    columns, said, tmp_path, write_jsonl
):
    with pytest.raises(ConfigError, match=said):
        build_blocks(write_jsonl(ROWS[:3]), tmp_path / "out", keep_columns=columns)
    assert not (tmp_path / "out").exists()


def test_the_columns_decide_the_key_and_their_order_does_not(tmp_path, write_jsonl):
    spec = DatasetSpec(dataset_name="a", source="s")
    assert "keep_columns" not in spec.to_json()
    some = DatasetSpec(dataset_name="a", source="s", keep_columns=("n",))
    assert dataset_key(some) != dataset_key(spec)
    path = write_jsonl(ROWS[:3])
    one = build_blocks(path, tmp_path / "a", keep_columns=["n", "raw"])
    assert build_blocks(path, tmp_path / "a", keep_columns=["raw", "n"]) == one


def test_a_configuration_names_them(tmp_path, write_jsonl, monkeypatch):
    monkeypatch.setattr("metaflow_hf.train.blocks.configured_store", lambda: open_store(tmp_path / "store"))
    monkeypatch.setattr("metaflow_hf.data.build.datasets_root", lambda: open_store(tmp_path / "store"))
    data = DataConfig(dataset=str(write_jsonl(ROWS)), keep_columns=["score"])
    key = build_source(str(data.dataset), data)
    with BlockManager(tmp_path / "store" / key) as blocks:
        assert blocks.read_rows(0, 0, 1) == [{"text": "row 0", "score": 0.0}]
