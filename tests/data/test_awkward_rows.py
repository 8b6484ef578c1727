"""Rows that break naive readers: kept exactly, or refused by number and column; never changed, never the end."""

import json
from decimal import Decimal

import pytest

from metaflow_hf.data import BlockManager, StreamingBlockWriter, build_blocks
from metaflow_hf.errors import BadRowError

KEPT = [
    "\u2028 and \u2029 are line ends to some",
    "\x85 and \x0b and \x0c and \x1c too",
    "NUL \x00 escapes",
    "CR \r in the middle, CRLF \r\n too",
    "\u2028",
    "\x00",
    'quotes " and backslashes \\ \\n \\u0041',
    "astral \U0001f600 and combining e\u0301",
    "x" * 2_000_000,
    " leading and trailing kept \n",
]


@pytest.mark.parametrize("how", ["raw", "escaped", "writer"])
def test_texts_are_kept_exactly(how, tmp_path, read_through_manager):
    if how == "writer":
        with StreamingBlockWriter(tmp_path / "out", "mine", 4) as writer:
            for text in KEPT:
                writer.write({"text": text})
    else:
        lines = [json.dumps({"text": text}, ensure_ascii=how == "escaped") for text in KEPT]
        (tmp_path / "raw.jsonl").write_text("\n".join(lines), "utf-8", newline="\n")
        build_blocks(tmp_path / "raw.jsonl", tmp_path / "out", samples_per_block=4)
    assert read_through_manager(tmp_path / "out", chunk=3) == KEPT


def test_other_columns_are_kept_as_they_are(tmp_path):
    rows = [
        {
            "text": "a",
            "none": None,
            "big": 123456789012345678901234567890,
            "float": 0.1,
            "deep": {"x": [[], {"y": {}}]},
        },
        {"text": "b", "true": True, "list": [1, "2", None], "": "empty name", "messages": [{"role": "user"}]},
    ]
    with StreamingBlockWriter(tmp_path / "out", "mine") as writer:
        for row in rows:
            writer.write(row)
    with BlockManager(tmp_path / "out") as manager:
        assert manager.get_rows(0, 0) == rows


def test_blank_rows_and_rows_without_text_are_counted_and_never_end_the_dataset(
    tmp_path, read_through_manager
):
    lines = ['{"text": "first"}', "", "   ", "\r", '{"text": null}', '{"text": ""}', '{"text": " \\t\\n"}', '{"n": 1}', '{"text": "last"}\r']  # fmt: skip
    (tmp_path / "raw.jsonl").write_bytes("\n".join(lines).encode())
    manifest = build_blocks(tmp_path / "raw.jsonl", tmp_path / "out")
    assert (manifest.total_samples, manifest.skipped_rows) == (2, 7)
    assert read_through_manager(tmp_path / "out") == ["first", "last"]
    assert (
        tmp_path / "out/blocks/block_00000.jsonl"
    ).read_bytes() == b'{"text": "first"}\n{"text": "last"}\n'


BAD_LINES = [
    (b'{"text": "broken"', "not a JSON object"),
    (b'{"text": "a"} {"text": "b"}', "not a JSON object"),
    (b'["text"]', "not a JSON object"),
    (b'"text"', "not a JSON object"),
    (b'{"text": "\xff\xfe"}', "not a JSON object"),
    (
        b'{"text": "a\\ud800"}',
        r"column 'text' holds half of a surrogate pair, or a byte that is not UTF-8 ('\ud800' at character 1)",
    ),
    (b'{"text": NaN}', "column 'text' holds float"),
    (b'{"text": [{"role": "user", "content": "\\udc00"}]}', "column 'text' holds list instead of text"),
    (b'{"text": "ok", "x": "\xff"}', "not a JSON object"),
    (b'{"text": "\x01"}', "not a JSON object"),
    (b'{"text": 5}', "column 'text' holds int"),
    (b'{"text": {"a": 1}}', "column 'text' holds dict"),
]


@pytest.mark.parametrize(("line", "why"), BAD_LINES)
def test_what_cannot_be_kept_is_refused_by_row_number(line, why, tmp_path):
    path = tmp_path / "raw.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "good too"}\n')
    with pytest.raises(BadRowError, match=r"raw\.jsonl: row 2 \(line 3\)") as error:
        build_blocks(path, tmp_path / "out")
    assert why in str(error.value)
    manifest = build_blocks(path, tmp_path / "skipping", on_bad_row="skip")
    assert (manifest.total_samples, manifest.skipped_rows) == (2, 2)


UNSTORABLE = [
    b"bytes",
    object(),
    {"deep": [b"bytes"]},
    "\ud800",
    {(1, 2): 3},
    {"\ud800": 1},
    memoryview(b"x"),
]


@pytest.mark.parametrize("value", UNSTORABLE, ids=lambda value: f"{type(value).__name__}")
@pytest.mark.parametrize("many", [False, True])
def test_a_column_that_json_cannot_keep_is_left_out_with_one_warning(value, many, tmp_path, caplog):
    rows = [{"text": "good", "y": 1}, *({"text": f"row {i}", "x": value, "y": 2.5} for i in range(5))]
    with StreamingBlockWriter(tmp_path, "mine") as writer:
        if many:
            writer.write_many(rows)
        else:
            for row in rows:
                writer.write(row)
    with BlockManager(tmp_path) as manager:
        assert manager.get_rows(0, 0) == [
            {name: cell for name, cell in row.items() if name != "x"} for row in rows
        ]
    warnings = [record.getMessage() for record in caplog.records if "'x'" in record.getMessage()]
    assert len(warnings) == 1, warnings
    assert warnings[0].startswith("mine: column 'x' is left out")


@pytest.mark.parametrize(
    "value", [b"bytes", "\ud800", "a\udcff", [{"role": "user", "content": b"x"}], 5, 1.5]
)
def test_a_text_that_json_cannot_keep_is_refused(value, tmp_path):
    with (
        pytest.raises(BadRowError, match="row 1 .*column 'text' holds"),
        StreamingBlockWriter(tmp_path, "mine", text_column="text") as writer,
    ):
        writer.write({"text": "good"})
        writer.write({"text": value})


def test_numbers_and_dates_of_python_become_what_json_has_for_them(tmp_path):
    with StreamingBlockWriter(tmp_path, "mine") as writer:
        writer.write({"text": "t", "d": Decimal("1.10"), "half": 0.5, "tuple": (1, 2)})
    with BlockManager(tmp_path) as manager:
        assert manager.get_rows(0, 0) == [{"text": "t", "d": "1.10", "half": 0.5, "tuple": [1, 2]}]


def test_a_long_row_is_one_row_of_its_chunk(tmp_path, write_jsonl):
    rows = [{"text": "short"}, {"text": "y" * 8_000_000}, {"text": "short again"}]
    build_blocks(write_jsonl(rows), tmp_path / "out")
    with BlockManager(tmp_path / "out", dataset_chunk_size=1) as manager:
        assert manager.get_chunk(0, 1) == [rows[1]["text"]]
        assert manager.read_rows(0, 2, 3) == [rows[2]]


def test_ascii_only_leaves_other_rows_out(tmp_path, write_jsonl, read_through_manager):
    rows = [{"text": "plain"}, {"text": "caf\u00e9"}, {"text": "plain too", "title": "caf\u00e9"}]
    manifest = build_blocks(write_jsonl(rows), tmp_path / "out", ascii_only=True)
    assert read_through_manager(tmp_path / "out", ascii_only=True) == ["plain", "plain too"]
    assert (manifest.skipped_rows, manifest.ascii_only) == (1, True)
