"""Values that JSON has no type for become what `datasets.Dataset.to_json` makes of them."""

import io
import json
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest

from metaflow_hf.data import StreamingBlockWriter, build_blocks, open_rows
from metaflow_hf.data.json_values import NotStorable, json_value

MOMENT = datetime(2020, 1, 2, 3, 4, 5, 678901)
COLUMNS = {
    "seconds": pa.array([MOMENT.replace(microsecond=0), None], pa.timestamp("s")),
    "microseconds": pa.array([MOMENT, None], pa.timestamp("us")),
    "nanoseconds": pa.array([1577934245678901234, None], pa.timestamp("ns")),
    "zone": pa.array([MOMENT.replace(tzinfo=UTC), None], pa.timestamp("us", tz="Europe/Berlin")),
    "far": pa.array([datetime(9999, 1, 2), datetime(1, 1, 2)], pa.timestamp("us")),
    "early": pa.array([datetime(1900, 1, 2, 0, 0, 0, 500), None], pa.timestamp("us")),
    "day": pa.array([date(2020, 1, 2), None], pa.date32()),
    "day64": pa.array([date(1950, 1, 2), None], pa.date64()),
    "time": pa.array([time(1, 2, 3), None], pa.time32("s")),
    "time64": pa.array([time(1, 2, 3, 456), None], pa.time64("us")),
    "decimal": pa.array([Decimal("1.10"), None], pa.decimal128(10, 2)),
    "large decimal": pa.array([Decimal("12345678901234567890.12"), None], pa.decimal128(30, 2)),
    "duration": pa.array([timedelta(days=1, seconds=2, microseconds=3), None], pa.duration("us")),
    "duration in seconds": pa.array([5, None], pa.duration("s")),
    "floats": pa.array([float("nan"), float("-inf")]),
    "small floats": pa.array([0.5, None], pa.float32()),
    "whole": pa.array([2**53 + 1, None]),
    "truth": pa.array([True, None]),
    "codes": pa.array(["a", "b"]).dictionary_encode(),
    "moments": pa.array([[MOMENT, None], None], pa.list_(pa.timestamp("us"))),
    "days": pa.array([[date(2020, 1, 2)], []], pa.list_(pa.date32())),
    "decimals": pa.array([[Decimal("1.10")], None], pa.list_(pa.decimal128(10, 2))),
    "lists of floats": pa.array([[float("nan"), 1.5, float("inf")], None]),
    "struct": pa.array(
        [
            {
                "a": MOMENT,
                "b": date(2020, 1, 2),
                "c": Decimal("1.5"),
                "d": time(1, 2),
                "e": timedelta(seconds=1),
            },
            None,
        ]
    ),
    "struct of structs": pa.array([{"x": [{"y": date(1960, 1, 1)}]}, {"x": []}]),
}


# A later pandas is going to write ISO texts instead.
@pytest.mark.filterwarnings("ignore:The default formatting of datetime")
@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("form", ["parquet", "save_to_disk", "writer"])
def test_as_to_json_has_them(name, form, tmp_path, read_all):
    table = pa.table({"text": ["a", "b"], "x": COLUMNS[name]})
    made, sink = datasets.Dataset(table), io.BytesIO()
    made.to_json(sink)
    expected = [json.loads(line) for line in sink.getvalue().splitlines()]
    if form == "writer":
        with StreamingBlockWriter(tmp_path / "out", "mine", text_column="text") as writer:
            writer.write_many(table.to_pylist())
        assert read_all(tmp_path / "out") == expected
        return
    if form == "parquet":
        pa.parquet.write_table(table, tmp_path / "a.parquet")
    else:
        made.save_to_disk(tmp_path / "a.parquet")
    assert list(open_rows(tmp_path / "a.parquet")) == expected
    for num_proc in (1, 2):
        build_blocks(tmp_path / "a.parquet", tmp_path / f"out-{num_proc}", num_proc=num_proc)
        assert read_all(tmp_path / f"out-{num_proc}") == expected


def test_dates_that_python_cannot_hold_are_kept(tmp_path):
    table = pa.table(
        {"text": ["a"], "x": pa.array([2**62], pa.timestamp("us")), "d": pa.array([10**7], pa.date32())}
    )
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    assert list(open_rows(tmp_path / "a.parquet")) == [
        {"text": "a", "x": 2**62 // 1000, "d": 10**7 * 86_400_000}
    ]


def test_columns_of_bytes_and_pictures_are_left_out(tmp_path, caplog):
    picture = {"bytes": b"\x89PNG\xff", "path": "a.png"}
    rows = [
        {"text": f"t{i}", "raw": b"x", "image": picture, "deep": [{"b": b"y"}], "n": i} for i in range(2500)
    ]
    features = datasets.Features(
        {
            "text": datasets.Value("string"), "raw": datasets.Value("binary"), "image": datasets.Image(),
            "deep": [{"b": datasets.Value("binary")}], "n": datasets.Value("int64"),
        }
    )  # fmt: skip
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "a.parquet")
    manifest = build_blocks(tmp_path / "a.parquet", tmp_path / "out", on_bad_row="skip")
    assert (manifest.total_samples, manifest.skipped_rows) == (2500, 0)
    assert list(open_rows(tmp_path / "a.parquet"))[:2] == [{"text": "t0", "n": 0}, {"text": "t1", "n": 1}]
    for column in ("raw", "image", "deep"):
        said = [r.getMessage() for r in caplog.records if f"column {column!r} is left out" in r.getMessage()]
        # One of the build, one of open_rows.
        assert len(said) == 2
        assert "bytes" in said[0]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float64(1.5), 1.5),
        (np.float32("nan"), None),
        (np.int8(3), 3),
        (np.bool_(True), True),
        (np.str_("s"), "s"),
        (np.array([[1.5, np.nan], [2, 3]]), [[1.5, None], [2.0, 3.0]]),
        (np.array(["a", "b"]), ["a", "b"]),
        (np.datetime64("2020-01-02T03:04:05.678901234"), 1577934245678),
        (np.datetime64("NaT"), None),
        (np.array(["2020-01-02"], "datetime64[D]"), [1577923200000]),
        (np.timedelta64(5, "s"), 5000),
        (pd.Timestamp("2020-01-02T03:04:05.678901234"), 1577934245678),
        (pd.NaT, None),
        (pd.Timedelta("1s"), 1000),
        (datetime(2020, 1, 2, tzinfo=timezone(timedelta(hours=1))), 1577919600000),
        (Decimal("NaN"), None),
        ((1, (2.0, float("inf"))), [1, [2.0, None]]),
        ({"a": {"b": time(1)}}, {"a": {"b": "01:00:00"}}),
    ],
    ids=repr,
)
def test_values_of_python_numpy_and_pandas(value, expected):
    assert json_value(value) == expected
    assert type(json_value(value)) is type(expected)


@pytest.mark.parametrize(
    "value", [b"x", bytearray(b"x"), memoryview(b"x"), [b"x"], {"a": (b"x",)}, np.bytes_(b"x")]
)
def test_bytes_are_no_json(value):
    with pytest.raises(NotStorable, match="bytes"):
        json_value(value)
