"""The same awkward rows through every kind of source: kept exactly, or refused by their number."""

import csv
import gzip
import io
import json
import lzma

import pyarrow as pa
import pyarrow.parquet
import pytest

from metaflow_hf.data import BlockManager, StreamingBlockWriter, build_blocks, verify_blocks
from metaflow_hf.errors import BadRowError

TEXTS = [
    "\u2028 and \u2029 are line ends to some",
    "\x85 and \x0b and \x0c and \x1c and \x1e too",
    "NUL \x00 in the middle",
    "\x00",
    "\u2028",
    "\x85",
    "CR \r in the middle",
    "LF \n and CRLF \r\n in the middle",
    " leading and trailing kept \t",
    'quotes " and "" and backslashes \\ \\n \\u0041, commas, a\ttab',
    "{",
    '{"text": "not an object but a text"}',
    "\ufeff a byte order mark",
    "astral \U0001f600, combining e\u0301, \uffff",
    "NaN",
    "null",
    "y" * 2_500_000,
    "the last",
]
# How the rows are written; a line of .txt ends at any line end, so such a text is several rows there.
KINDS = [
    "jsonl", "jsonl escaped", "jsonl crlf", "jsonl bom", "jsonl.gz", "ndjson.xz", "json", "json lines", "csv", "tsv",
    "parquet", "txt", "save_to_disk", "blocks", "store", "writer",
]  # fmt: skip


# One for each way of reading.
LARGE = ("jsonl", "json", "csv", "parquet", "txt", "writer")


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_kept_exactly(kind, tmp_path, memory_store):
    texts = [text for text in TEXTS if not (kind == "txt" and ("\n" in text or "\r" in text))]
    if kind in LARGE:
        texts.insert(-1, "z" * 8_000_000)
    _build(kind, [{"text": text} for text in texts], tmp_path, memory_store)
    with BlockManager(tmp_path / "out", dataset_chunk_size=5) as manager:
        kept = [
            text
            for block_id in range(manager.get_total_blocks())
            for chunk_id in range(manager.get_block(block_id).chunk_count(5))
            for text in manager.get_chunk(block_id, chunk_id)
        ]
    assert [_short(text) for text in kept] == [_short(text) for text in texts]
    assert kept == texts
    assert verify_blocks(tmp_path / "out") == []


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "txt"])
def test_rows_without_text_are_counted_and_never_the_end(kind, tmp_path, memory_store):
    rows = [{"text": text} for text in ("first", "", " ", "\n\t\r\n ", "last")]
    rows.insert(2, {"text": "" if kind in ("csv", "tsv") else None})
    manifest = _build(kind, rows, tmp_path, memory_store)
    if kind == "blocks":
        # They were counted when those blocks were built.
        assert manifest.total_samples == 2
        return
    assert (manifest.total_samples, manifest.skipped_rows) == (2, 4)


VALUES = [
    None, 0, -1, 2**63, -(2**63) - 1, 10**30, 0.1, 1e-300, -0.0, True, "", [], {}, [[], [None, {"": ""}]],
    {"a": {"b": [1, "2", None, False]}}, "\u2028\x00", [{"role": "user", "content": "hi"}],
]  # fmt: skip


@pytest.mark.parametrize("kind", ["jsonl", "jsonl escaped", "json", "blocks", "store", "writer"])
def test_other_values_are_kept_as_they_are(kind, tmp_path, memory_store):
    rows = [{"text": "t", "value": value, "n": i} for i, value in enumerate(VALUES)]
    _build(kind, rows, tmp_path, memory_store)
    with BlockManager(tmp_path / "out") as manager:
        kept = [
            row for block_id in range(manager.get_total_blocks()) for row in manager.get_rows(block_id, 0)
        ]
    assert [json.dumps(row) for row in kept] == [json.dumps(row) for row in rows]


@pytest.mark.parametrize(
    "line",
    [
        b'{"text":"a","text":"b","x":1,"x":2}',
        b'{"x":1.10,"text":"numbers as written","y":1E5,"z":-0,"big":123456789012345678901234567890}',
        b'{ "text" : "spaces" ,\t"x" : [ 1 , 2 ] }',
        b'{"text":"\\u00e9\\/\\ud83d\\ude00"}',
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "json", "blocks"])
def test_a_line_of_json_is_kept_byte_for_byte(line, kind, tmp_path):
    place = tmp_path / f"raw.{'json' if kind == 'json' else 'jsonl'}"
    place.write_bytes(b"[" + line + b"]" if kind == "json" else line)
    if kind == "blocks":
        build_blocks(place, tmp_path / "first")
        place = tmp_path / "first"
    build_blocks(place, tmp_path / "out")
    assert (tmp_path / "out/blocks/block_00000.jsonl").read_bytes() == line + b"\n"


GOOD = [{"text": "good", "x": "x"}] * 3
BAD_JSON = [
    b'{"text": "\xff\xfe"}', b'{"text": "ok", "x": "\xc3"}', b'{"text": "\\ud800"}', b'{"text": NaN}', b'{"text": 5}',
    b'{"text": {"a": 1}}', b'{"text": "ok", "x": 01}', b'["text"]', b'"text"', b'{"text": "\x01"}',
    b'{"text": "ok", "x": ' + b"[" * 5000 + b"]" * 5000 + b"}", b'{"text": "ok", "x": ' + b"9" * 5000 + b"}",
    b'{"text": "a"} {"text": "b"}', b'{"text": "a"}, ', b'{"text":', b"\x00", b"\xef\xbb\xbf{}",
]  # fmt: skip
# In an array these are an error of the whole file: what is an element can no longer be told.
UNSOUND = [line for line in BAD_JSON if line in BAD_JSON[6:7] or line in BAD_JSON[9:]]


@pytest.mark.parametrize("line", BAD_JSON, ids=lambda line: repr(line[:30]))
def test_a_bad_line_of_json_is_refused_by_its_number(line, tmp_path):
    lines = [*(json.dumps(row).encode() for row in GOOD), b"", line, json.dumps(GOOD[0]).encode()]
    (tmp_path / "raw.jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(BadRowError, match=r"raw\.jsonl: row 4 \(line 5\)"):
        build_blocks(tmp_path / "raw.jsonl", tmp_path / "out")
    manifest = build_blocks(tmp_path / "raw.jsonl", tmp_path / "skip", on_bad_row="skip")
    assert (manifest.total_samples, manifest.skipped_rows) == (4, 2)


@pytest.mark.parametrize("line", [line for line in BAD_JSON if line not in UNSOUND], ids=repr)
def test_a_bad_element_of_an_array_is_refused_by_its_number(line, tmp_path):
    elements = [*(json.dumps(row).encode() for row in GOOD), line]
    (tmp_path / "raw.json").write_bytes(b"[" + b",\n".join(elements) + b"]")
    with pytest.raises(BadRowError, match=r"raw\.json: row 3 "):
        build_blocks(tmp_path / "raw.json", tmp_path / "out")
    assert build_blocks(tmp_path / "raw.json", tmp_path / "skip", on_bad_row="skip").total_samples == 3


@pytest.mark.parametrize(("ending", "data"), [
    ("csv", b"x,text\n1,a\n2,b\n3,c\n4,\xff\n"), ("csv", b"x,text\n1,a\n2,b\n3,c\n4\n"), ("txt", b"a\nb\nc\n\xc3(\n"),
    ("tsv", b"x\ttext\n1\ta\n2\tb\n3\tc\n4\t\xff\n"), ("csv", b'x,text\n1,"a\nb"\n2,b\n3,c\n4,d,e\n'),
])  # fmt: skip
def test_a_bad_row_of_text_is_refused_by_its_number(ending, data, tmp_path):
    (tmp_path / f"raw.{ending}").write_bytes(data)
    with pytest.raises(BadRowError, match=rf"raw\.{ending}: row 3 "):
        build_blocks(tmp_path / f"raw.{ending}", tmp_path / "out")
    assert build_blocks(tmp_path / f"raw.{ending}", tmp_path / "s", on_bad_row="skip").total_samples == 3


@pytest.mark.parametrize(("value", "kept"), [
    (b"NaN", None), (b"-Infinity", None), (b"1e999", None), (b'[1, NaN, {"y": Infinity}]', [1, None, {"y": None}]),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_what_python_writes_beyond_json_becomes_null(value, kept, kind, tmp_path, read_all):
    line = b'{"text": "ok", "x": ' + value + b"}"
    (tmp_path / f"raw.{kind}").write_bytes(line if kind == "jsonl" else b"[" + line + b"]")
    build_blocks(tmp_path / f"raw.{kind}", tmp_path / "out")
    assert read_all(tmp_path / "out") == [{"text": "ok", "x": kept}]


@pytest.mark.parametrize(
    ("value", "kept"), [(float("nan"), None), (float("-inf"), None), ([1.0, float("inf")], [1.0, None])]
)
@pytest.mark.parametrize("kind", ["parquet", "save_to_disk", "writer"])
def test_numbers_that_json_has_not_become_null(kind, value, kept, tmp_path, memory_store, read_all):
    rows = [{"text": "good", "x": None}] * 3 + [{"text": "bad", "x": value}]
    _build(kind, rows, tmp_path, memory_store)
    assert read_all(tmp_path / "out") == [*rows[:3], {"text": "bad", "x": kept}]


UNSTORABLE = [
    ("parquet", b"bytes"), ("save_to_disk", {"deep": [b"bytes"]}), ("writer", b"bytes"), ("jsonl", b'"\\ud800"'),
    ("json", b'{"y": "\\udfff"}'), ("csv", b"\xff"), ("tsv", b"\xc3("),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "value"), UNSTORABLE)
@pytest.mark.parametrize("num_proc", [1, 2])
def test_a_column_that_cannot_be_kept_is_left_out_with_one_warning(
    kind, value, num_proc, tmp_path, memory_store, read_all, caplog
):
    rows = [{"text": "good", "x": None}] * 3 + [{"text": "also good", "x": value}] * 3
    if isinstance(value, bytes) and kind in ("jsonl", "json", "csv", "tsv"):
        line = {
            "jsonl": b'{"text":"t","x":%b}\n', "json": b'{"text":"t","x":%b}', "csv": b"t,%b\n", "tsv": b"t\t%b\n",
        }[kind] % value  # fmt: skip
        head = {"json": b"[", "csv": b"text,x\n", "tsv": b"text\tx\n"}.get(kind, b"")
        data = line + b"," + line + b"]" if kind == "json" else line * 2
        (tmp_path / f"raw.{kind}").write_bytes(head + data)
        build_blocks(tmp_path / f"raw.{kind}", tmp_path / "out", num_proc=num_proc)
        assert read_all(tmp_path / "out") == [{"text": "t"}] * 2
    else:
        _build(kind, rows, tmp_path, memory_store)
        assert read_all(tmp_path / "out") == [*rows[:3], *[{"text": "also good"}] * 3]
    warnings = [record.getMessage() for record in caplog.records if "'x'" in record.getMessage()]
    assert len(warnings) == 1, warnings
    assert "column 'x' is left out" in warnings[0]


def _build(kind, rows, tmp_path, memory_store):
    settings = {"samples_per_block": 7, "text_column": "text"}
    if kind == "writer":
        with StreamingBlockWriter(tmp_path / "out", "raw", 7, text_column="text") as writer:
            for row in rows:
                writer.write(row)
        return writer.close()
    if kind == "save_to_disk":
        import datasets

        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "raw")
        return build_blocks(tmp_path / "raw", tmp_path / "out", **settings)
    if kind in ("blocks", "store"):
        place = tmp_path / "raw.jsonl"
        place.write_bytes(_encode("jsonl", rows))
        if kind == "store":
            memory_store.upload(place, "raw.jsonl")
            return build_blocks(f"{memory_store.uri}/raw.jsonl", tmp_path / "out", **settings)
        build_blocks(place, tmp_path / "first", compression="zstd", **settings)
        return build_blocks(tmp_path / "first", tmp_path / "out", **settings)
    ending = {
        "jsonl escaped": "jsonl",
        "jsonl crlf": "jsonl",
        "jsonl bom": "jsonl",
        "json lines": "json",
    }.get(kind, kind)
    place = tmp_path / f"raw.{ending}"
    place.write_bytes(_encode(kind, rows))
    return build_blocks(place, tmp_path / "out", **settings)


def _encode(kind, rows):
    if kind == "parquet":
        buffer = io.BytesIO()
        pa.parquet.write_table(pa.Table.from_pylist(rows), buffer, row_group_size=2)
        return buffer.getvalue()
    lines = [json.dumps(row, ensure_ascii=kind == "jsonl escaped").encode() for row in rows]
    if kind == "json":
        return b" [\r\n" + b"\n ,".join(lines) + b" ]\n"
    if kind in ("csv", "tsv"):
        buffer = io.StringIO(newline="")
        writer = csv.DictWriter(buffer, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
        return buffer.getvalue().encode()
    if kind == "txt":
        return "\n".join(row["text"] for row in rows).encode()
    data = (b"\r\n" if kind == "jsonl crlf" else b"\n").join(lines)
    if kind == "jsonl bom":
        return b"\xef\xbb\xbf" + data
    compress = {"jsonl.gz": gzip.compress, "ndjson.xz": lzma.compress}.get(kind, bytes)
    return compress(data)


def _short(text):
    return (len(text), text[:100])
