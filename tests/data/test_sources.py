"""Every source gives exactly its rows: once through blocks, and back."""

import bz2
import csv
import gzip
import io
import json
import lzma
import zipfile

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard

from metaflow_hf.data import StreamingBlockWriter, build_blocks, process_raw_dataset_to_blocks, verify_blocks
from metaflow_hf.data.manifest import Cursor
from metaflow_hf.data.sources import open_source
from metaflow_hf.data.sources.layout import layout_of_files
from metaflow_hf.errors import BadRowError, ConfigError, DatasetMismatch, IntegrityError, SelectionError
from metaflow_hf.store import open_store


def test_json_lines_are_kept_byte_for_byte(tmp_path):
    lines = [
        b'{"text": "spaces  kept", "n": 1.10, "n": 2}',
        '{"text":"\u2028 and \x85 raw","e":"\\u00e9\\/\\u0000"}'.encode(),
        b'{"b":1,"a":[1,{"x":null}],"text":"order of keys"}',
    ]
    (tmp_path / "raw.jsonl").write_bytes(b"\n".join(lines))
    manifest = build_blocks(tmp_path / "raw.jsonl", tmp_path / "out")
    assert (tmp_path / "out/blocks/block_00000.jsonl").read_bytes() == b"\n".join(lines) + b"\n"
    assert manifest.total_samples == 3
    assert manifest.is_complete


@pytest.mark.parametrize("ending", ["jsonl", "ndjson", "jsonl.gz", "jsonl.zst", "jsonl.bz2", "csv.xz", "json", "json.gz", "csv", "tsv", "parquet", "txt", "txt.zst", "arrow", "zip"])  # fmt: skip
def test_round_trip(ending, tmp_path, read_all, read_through_manager):
    texts = [f'text {i}, with "quotes", a\ttab and \u2028 é \U0001f600' for i in range(2500)]
    rows = [{"text": text, "n": str(i)} for i, text in enumerate(texts)]
    path = tmp_path / f"raw.{ending}"
    _write(path, rows)
    manifest = build_blocks(path, tmp_path / "out", samples_per_block=700)
    expected = [{"text": text} for text in texts] if ending.startswith("txt") else rows
    assert read_all(tmp_path / "out") == expected
    assert [block.sample_count for block in manifest.blocks] == [700, 700, 700, 400]
    assert read_through_manager(tmp_path / "out", chunk=333) == texts


def test_a_json_array_is_streamed_and_its_values_are_kept_as_written(tmp_path):
    text = '[ {"text": "a",\r\n "n": 1.10},\n\n{"text":"b","n":1e5}\n,{"text":"c ]","deep":[{"x":"}"}]}]'
    (tmp_path / "raw.json").write_text(text)
    build_blocks(tmp_path / "raw.json", tmp_path / "out")
    stored = (tmp_path / "out/blocks/block_00000.jsonl").read_text().splitlines()
    assert stored[0].replace(" ", "") == '{"text":"a","n":1.10}'
    assert stored[1] == '{"text":"b","n":1e5}'
    assert json.loads(stored[2]) == {"text": "c ]", "deep": [{"x": "}"}]}


def test_a_json_array_whose_elements_are_larger_than_a_read(tmp_path, read_all):
    rows = [{"text": "x" * 2_500_000}, {"text": "y"}, {"text": "z" * 1_200_000}]
    (tmp_path / "raw.json").write_text(json.dumps(rows, indent=1))
    build_blocks(tmp_path / "raw.json", tmp_path / "out")
    assert read_all(tmp_path / "out") == rows


@pytest.mark.parametrize(
    "broken",
    [
        '[{"text":"a"}',
        '[{"text":"a"},,',
        "[",
        '[{"text":"a" "b"}]',
        '[{"text":"a"}]\n[{"text":"b"}]',
        '[{"text":' + "[" * 100_000,
    ],
)
def test_a_broken_json_array_is_an_error_not_an_end(broken, tmp_path):
    (tmp_path / "raw.json").write_text(broken)
    with pytest.raises(SelectionError, match="raw.json"):
        build_blocks(tmp_path / "raw.json", tmp_path / "out", text_column="text")


def test_parquet_keeps_types_and_reads_row_groups(tmp_path, read_all):
    table = pa.table({"text": ["a", None, "c"], "n": [1, 2, None], "t": [[1], [], None], "s": [{"x": 1}] * 3})
    pa.parquet.write_table(table, tmp_path / "raw.parquet", row_group_size=1)
    manifest = build_blocks(tmp_path / "raw.parquet", tmp_path / "out")
    assert read_all(tmp_path / "out") == [
        {"text": "a", "n": 1, "t": [1], "s": {"x": 1}},
        {"text": "c", "n": None, "t": None, "s": {"x": 1}},
    ]
    assert manifest.skipped_rows == 1


def test_a_folder_of_save_to_disk(tmp_path, read_all):
    datasets = pytest.importorskip("datasets")
    rows = [{"text": f"t{i}", "n": i} for i in range(1500)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved", num_shards=3)
    process_raw_dataset_to_blocks(tmp_path / "saved", tmp_path / "out", "mine", 400)
    assert read_all(tmp_path / "out") == rows
    both = datasets.DatasetDict(
        {"test": datasets.Dataset.from_list(rows[:3]), "train": datasets.Dataset.from_list(rows[3:9])}
    )
    both.save_to_disk(tmp_path / "splits")
    build_blocks(tmp_path / "splits", tmp_path / "out2")
    assert read_all(tmp_path / "out2") == rows[3:9]


def test_a_directory_is_read_in_the_order_of_names(tmp_path, write_jsonl, read_all):
    for name in ("b.jsonl", "a/2.jsonl", "a/10.jsonl", ".hidden.jsonl"):
        write_jsonl([{"text": name}], f"raw/{name}")
    (tmp_path / "raw/README.md").write_text("no rows here")
    (tmp_path / "raw/dataset_info.json").write_text("{}")
    build_blocks(tmp_path / "raw", tmp_path / "out")
    assert [row["text"] for row in read_all(tmp_path / "out")] == ["a/10.jsonl", "a/2.jsonl", "b.jsonl"]


@pytest.mark.parametrize("num_proc", [1, 2])
def test_lines_of_text_end_as_in_any_text_file_and_are_not_changed(num_proc, tmp_path, read_all):
    (tmp_path / "raw.txt").write_bytes(
        "\ufeffone \u2028 \x85 \x0b still one\r\n\n  two  \n\r\n \t\nthree\rfour\r\r\nfive\r".encode()
    )
    manifest = build_blocks(tmp_path / "raw.txt", tmp_path / "out", num_proc=num_proc)
    assert [row["text"] for row in read_all(tmp_path / "out")] == [
        "one \u2028 \x85 \x0b still one",
        "  two  ",
        "three",
        "four",
        "five",
    ]
    assert manifest.skipped_rows == 4


@pytest.mark.parametrize("block", [1, 7, 100])
def test_texts_of_any_line_ends_are_gone_on_with_in_the_middle(block, tmp_path):
    texts = [f"line {i}" for i in range(60)]
    ends = ["\n", "\r\n", "\r"]
    (tmp_path / "raw.txt").write_bytes("".join(text + ends[i % 3] for i, text in enumerate(texts)).encode())
    source = open_source(tmp_path / "raw.txt")
    (whole,) = source.batches(Cursor())
    for count in range(0, 60, block):
        rest = [row["text"] for batch in source.batches(whole.after(count)) for row in batch.rows]
        assert rest == texts[count:]


def test_csv_cells_stay_text_and_may_hold_lines(tmp_path, read_all):
    big = "x" * 300_000
    with (tmp_path / "raw.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id", "text"], ["007", 'a\nb, "c"'], ["1e5", big]])
    build_blocks(tmp_path / "raw.csv", tmp_path / "out")
    assert read_all(tmp_path / "out") == [{"id": "007", "text": 'a\nb, "c"'}, {"id": "1e5", "text": big}]


def test_a_csv_row_with_a_missing_cell_is_refused_by_number(tmp_path):
    (tmp_path / "raw.csv").write_text("id,text\n1,a\n2\n3,c\n")
    with pytest.raises(BadRowError, match=r"raw\.csv: row 1 .*1 cells"):
        build_blocks(tmp_path / "raw.csv", tmp_path / "out")
    assert build_blocks(tmp_path / "raw.csv", tmp_path / "out", on_bad_row="skip").total_samples == 2


@pytest.mark.parametrize("ending", ["jsonl.gz", "jsonl.zst", "jsonl.bz2", "jsonl.xz", "parquet"])
def test_a_damaged_file_is_an_error_not_an_end(ending, tmp_path):
    path = tmp_path / f"raw.{ending}"
    _write(path, [{"text": f"{i} {hash(i * 7919)}"} for i in range(5000)])
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(IntegrityError, match="raw"):
        build_blocks(path, tmp_path / "out", samples_per_block=100)
    assert not (tmp_path / "out/commits/complete.json").exists()


@pytest.mark.parametrize("ending", ["jsonl.gz", "jsonl.zst", "jsonl.bz2", "jsonl.xz", "parquet"])
def test_a_file_that_is_not_what_its_ending_says_is_named(ending, tmp_path):
    (tmp_path / f"raw.{ending}").write_bytes(b'{"text": "plain"}\n' * 100)
    with pytest.raises(IntegrityError, match=f"raw.{ending}"):
        build_blocks(tmp_path / f"raw.{ending}", tmp_path / "out", text_column="text")


@pytest.mark.parametrize("location", ["missing.jsonl", "image.png", "empty"])
def test_what_holds_no_rows_is_refused(location, tmp_path):
    (tmp_path / "image.png").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SelectionError, match=location):
        build_blocks(tmp_path / location, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_blocks_are_a_source_too(tmp_path, write_jsonl, read_all):
    rows = [{"text": f"t{i}", "n": i} for i in range(25)]
    build_blocks(write_jsonl(rows), tmp_path / "first", samples_per_block=10, compression="zstd")
    manifest = build_blocks(tmp_path / "first", tmp_path / "second", samples_per_block=7)
    assert read_all(tmp_path / "second") == rows
    assert (manifest.dataset_name, manifest.total_blocks) == ("raw", 4)
    block = tmp_path / "first/blocks/block_00001.jsonl.zst"
    block.write_bytes(block.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match="block_00001"):
        build_blocks(tmp_path / "first", tmp_path / "third")


def test_blocks_that_are_not_complete_are_no_source(tmp_path, write_jsonl):
    with pytest.raises(ZeroDivisionError), StreamingBlockWriter(tmp_path / "out", "mine", 1) as writer:
        writer.write("one")
        raise ZeroDivisionError
    with pytest.raises(SelectionError, match="not complete"):
        build_blocks(tmp_path / "out", tmp_path / "out2")


@pytest.mark.parametrize("num_proc", [1, 2])
def test_objects_of_a_store(num_proc, tmp_path, memory_store, read_all):
    memory_store.put("raw/b.jsonl", b'{"text": "3"}\n')
    memory_store.put("raw/a/x.json", b'[{"text": "one"}, {"text": "two"}]')
    memory_store.put("raw/.hidden.jsonl", b"no")
    memory_store.put("raw/readme.md", b"no")
    uri = f"{memory_store.uri}/raw"
    manifest = build_blocks(uri, tmp_path / "all", num_proc=num_proc)
    assert [row["text"] for row in read_all(tmp_path / "all")] == ["one", "two", "3"]
    assert manifest.source == uri
    build_blocks(f"{uri}/b.jsonl", tmp_path / "one", num_proc=num_proc)
    assert read_all(tmp_path / "one") == [{"text": "3"}]
    build_blocks(tmp_path / "all", f"{memory_store.uri}/blocks", samples_per_block=2)
    build_blocks(f"{memory_store.uri}/blocks", tmp_path / "again")
    assert read_all(tmp_path / "again") == read_all(tmp_path / "all")
    memory_store.put("raw/b.jsonl", b'{"text": "changed"}\n')
    with pytest.raises(DatasetMismatch, match="source_digest"):
        build_blocks(uri, tmp_path / "all")


def test_a_manager_reads_objects_of_a_store(tmp_path, memory_store, read_through_manager):
    memory_store.put("raw/b.jsonl", b'{"text": "3"}\n')
    assert read_through_manager(f"{memory_store.uri}/raw", cache_dir=tmp_path) == ["3"]
    assert read_through_manager(f"{memory_store.uri}/raw/b.jsonl", cache_dir=tmp_path) == ["3"]


def test_files_and_blocks_of_a_bucket(s3_root, tmp_path, read_all, read_through_manager):
    bucket = open_store(s3_root)
    rows = [{"text": str(i), "n": i} for i in range(3000)]
    _write(tmp_path / "a.parquet", rows[:2000])
    _write(tmp_path / "b.jsonl.gz", rows[2000:])
    _write(tmp_path / "b.parquet", rows[2000:])
    for name in ("a.parquet", "b.parquet", "b.jsonl.gz"):
        bucket.put(f"raw/{name}", (tmp_path / name).read_bytes())
    manifest = build_blocks(f"{s3_root}/raw", f"{s3_root}/blocks", samples_per_block=1300, max_rows=2600)
    assert [block.sample_count for block in manifest.blocks] == [1300, 1300]
    assert verify_blocks(f"{s3_root}/blocks") == []
    build_blocks(f"{s3_root}/blocks", tmp_path / "copy")
    assert read_all(tmp_path / "copy") == rows[:2600]
    texts = read_through_manager(f"{s3_root}/raw/a.parquet", chunk=700, cache_dir=f"{s3_root}/built")
    assert texts == [row["text"] for row in rows[:2000]]


def test_a_place_of_a_store_that_holds_no_rows_is_refused(memory_store, tmp_path):
    for location in (memory_store.uri, f"{memory_store.uri}/missing.jsonl"):
        with pytest.raises(SelectionError, match="no file with rows"):
            build_blocks(location, tmp_path / "out")


def test_a_file_uri_is_a_local_file(tmp_path, write_jsonl, read_all):
    build_blocks(write_jsonl([{"text": "t"}], "a b%20c.jsonl").as_uri(), tmp_path / "out")
    assert read_all(tmp_path / "out") == [{"text": "t"}]


def test_a_source_of_an_unknown_scheme_is_refused(tmp_path):
    with pytest.raises(SelectionError, match="ftp://"):
        build_blocks("ftp://host/file.jsonl", tmp_path / "out")


@pytest.mark.parametrize("location", ["", 7, [{"text": "a"}], None])
def test_what_names_no_source_is_refused(location, tmp_path):
    with pytest.raises(SelectionError, match="names no source.*StreamingBlockWriter"):
        build_blocks(location, tmp_path / "out")


@pytest.mark.parametrize(
    ("row", "named", "found"),
    [
        ({"id": "1", "text": "t"}, None, "text"),
        ({"content": "c", "title": "t"}, None, "content"),
        ({"id": 1, "story": "only text"}, None, "story"),
        ({"id": "1", "conversations": [{"from": "human", "value": "hi"}]}, None, "conversations"),
        ({"instruction": "i", "input": "", "output": "o"}, None, "output"),
        ({"messages": [{"role": "user", "content": "hi"}], "id": "1", "x": "2"}, None, "messages"),
        ({"text": "t", "other": "o"}, "other", "other"),
    ],
)
def test_the_text_column_is_found_by_name_and_type(row, named, found, tmp_path, write_jsonl):
    assert build_blocks(write_jsonl([row]), tmp_path / "out", text_column=named).text_column == found


@pytest.mark.parametrize(
    ("row", "named"),
    [({"a": "1", "b": "2"}, None), ({"text": "t"}, "txet"), ({"text": "t", "n": 1}, "n"), ({"n": 1}, None)],
)
def test_an_unclear_text_column_lists_the_columns_before_anything_is_written(
    row, named, tmp_path, write_jsonl
):
    with pytest.raises(ConfigError) as error:
        build_blocks(write_jsonl([row]), tmp_path / "out", text_column=named)
    assert all(column in str(error.value) for column in row)
    assert not (tmp_path / "out").exists()


def _write(path, rows):
    ending = path.name.partition(".")[2]
    if ending.startswith("parquet"):
        pa.parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=600)
        return
    if ending == "arrow":
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_file(path, table.schema) as file:
            file.write_table(table, max_chunksize=600)
        return
    if ending == "zip":
        _write_zip(path, rows)
        return
    if ending.startswith(("csv", "tsv")):
        file = io.StringIO(newline="")
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if ending == "tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
        data = file.getvalue().encode()
    elif ending.startswith("json") and not ending.startswith("jsonl"):
        data = json.dumps(rows).encode()
    elif ending.startswith("txt"):
        data = b"".join(row["text"].encode() + b"\n" for row in rows)
    else:
        data = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
    compress = {
        "gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress, "bz2": bz2.compress, "xz": lzma.compress,
    }.get(ending.rpartition(".")[2])  # fmt: skip
    path.write_bytes(compress(data) if compress else data)


def _write_zip(path, rows):
    """Three files in the order of their names, which is not that of the archive; and what is to be left out."""
    parts = {"z.jsonl": rows[1900:], "a/x.jsonl.gz": rows[:1100], "b.json": rows[1100:1900]}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, part in parts.items():
            member = path.with_name(f"member.{name.partition('.')[2]}")
            _write(member, part)
            archive.write(member, name)
            member.unlink()
        for name in ("README.md", "__MACOSX/._b.csv", ".hidden.jsonl", "photo.png", "LICENSE.txt"):
            archive.writestr(name, b"no")


def test_an_archive_is_gone_on_with_in_the_middle(tmp_path):
    rows = [{"text": str(i), "n": str(i)} for i in range(2500)]
    _write_zip(tmp_path / "raw.zip", rows)
    source = open_source(tmp_path / "raw.zip")
    for row in (0, 700, 1100, 1500, 2499, 2500):
        read = [r for batch in source.batches(Cursor(row=row)) for r in batch.rows]
        assert [int(r["n"] if isinstance(r, dict) else json.loads(r)["n"]) for r in read] == [
            *range(row, 2500)
        ]
    manifests = [build_blocks(tmp_path / "raw.zip", tmp_path / f"out-{n}", num_proc=n) for n in (1, 2)]
    assert manifests[0] == manifests[1]
    batches = list(source.batches(Cursor(row=1101)))
    assert (batches[0].name, batches[0].first_row) == ("raw.zip/b.json", 1)
    assert batches[0].after(2) == Cursor(row=1103)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda data: data[: len(data) // 2], IntegrityError, "raw.zip is damaged"),
        (lambda data: data.replace(b"is right", b"is wrong", 1), IntegrityError, "raw.zip.* is damaged.*CRC"),
        (lambda data: data.replace(b"a.jsonl", b"a.photo"), SelectionError, "raw.zip has no files with rows"),
        (lambda data: _encrypted(data), SelectionError, "raw.zip/a.jsonl is encrypted"),
    ],
)
def test_an_archive_that_cannot_be_read_is_named(change, error, said, tmp_path):
    with zipfile.ZipFile(tmp_path / "raw.zip", "w") as archive:
        archive.writestr("a.jsonl", b'{"text": "this is right"}\n')
    (tmp_path / "raw.zip").write_bytes(change((tmp_path / "raw.zip").read_bytes()))
    with pytest.raises(error, match=said):
        build_blocks(tmp_path / "raw.zip", tmp_path / "out")
    assert not (tmp_path / "out/commits").exists()


def _encrypted(data):
    """With the mark of an encrypted file in the archive's directory."""
    flags = data.index(b"PK\x01\x02") + 8
    return data[:flags] + b"\x01" + data[flags + 1 :]


def test_an_archive_that_cannot_be_looked_into_is_said():
    with pytest.raises(SelectionError, match="a/b is archives that are not on this machine"):
        layout_of_files(["data.zip"], {}, None, None, where="hf://a/b")


def test_archives_are_files_of_a_directory(tmp_path, read_all):
    rows = [{"text": str(i), "n": str(i)} for i in range(2500)]
    (tmp_path / "raw").mkdir()
    _write_zip(tmp_path / "raw/more.zip", rows)
    build_blocks(tmp_path / "raw", tmp_path / "out")
    assert read_all(tmp_path / "out") == rows


def test_a_dataset_of_the_hub_without_its_scheme_is_recognised():
    with pytest.raises(SelectionError, match=r"write hf://roneneldan/TinyStories\."):
        open_source("roneneldan/TinyStories")
