"""`open_rows` gives the rows that `datasets.load_dataset` gives of the same directory; where it is stricter, it says so."""

import bz2
import gzip
import io
import json
import logging
import lzma
import tarfile
import zipfile
from datetime import date, datetime
from decimal import Decimal

import datasets
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
import zstandard

from metaflow_hf.data import BlockManager, build_blocks, open_rows
from metaflow_hf.data.json_values import NotStorable, json_value
from metaflow_hf.data.sources import open_source
from metaflow_hf.data.sources.splits import SplitPart, bounds
from metaflow_hf.data.stored import find_stored
from metaflow_hf.errors import SelectionError
from metaflow_hf.store import open_store


@pytest.fixture(autouse=True)
def _quiet():
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    yield
    datasets.enable_progress_bars()


def _rows(name, count=3):
    return [{"text": f"{name} {i}", "n": i} for i in range(count)]


def _jsonl(name, count=3):
    return "".join(json.dumps(row) + "\n" for row in _rows(name, count)).encode()


def _json(name):
    return json.dumps(_rows(name), indent=1).encode()


def _csv(name, delimiter=","):
    return "".join(
        f"{line}\n"
        for line in [f"text{delimiter}n", *(f"{r['text']}{delimiter}{r['n']}" for r in _rows(name))]
    ).encode()


def _txt(name):
    return "".join(f"{row['text']}\n" for row in _rows(name)).encode()


def _parquet(name, rows=None):
    buffer = io.BytesIO()
    pa.parquet.write_table(pa.Table.from_pylist(rows or _rows(name)), buffer, row_group_size=2)
    return buffer.getvalue()


def _arrow(name):
    sink = io.BytesIO()
    table = pa.Table.from_pylist(_rows(name))
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _feather(name):
    sink = io.BytesIO()
    pa.feather.write_feather(pa.Table.from_pylist(_rows(name)), sink, compression="zstd")
    return sink.getvalue()


def _zip(files):
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return sink.getvalue()


def _tar(files, mode="w"):
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode=mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def _readme(*configs):
    lines = ["---", "configs:"]
    for config in configs:
        lines += [f"- config_name: {config['name']}", *config["lines"]]
    return "\n".join([*lines, "---", "# About", ""]).encode()


COMPRESS = {"gz": gzip.compress, "zst": zstandard.compress, "bz2": bz2.compress, "xz": lzma.compress}
SAMPLES = {
    f"{part}/{i:03d}.{ending}": data
    for part in ("a", "b")
    for i in range(3)
    for ending, data in {
        "txt": f"words {part} {i}".encode(),
        "json": b'{"n": 1, "deep": {"x": [1]}}',
        "cls": b"7",
    }.items()
}
LAYOUTS = {
    "one file": {"a.jsonl": _jsonl("a")},
    "several files": {"b.jsonl": _jsonl("b"), "a.jsonl": _jsonl("a"), "c/d.jsonl": _jsonl("d")},
    "json arrays": {"a.json": _json("a"), "b.json": _json("b")},
    "json and jsonl": {"a.json": _json("a"), "b.jsonl": _jsonl("b")},
    "array of texts": {"a.json": b'["one", "two"]'},
    "objects over lines": {"a.json": b"\n".join(json.dumps(row, indent=2).encode() for row in _rows("a"))},
    "one object": {"a.json": b'{"text": "a", "n": 1}'},
    "one conversation": {"a.json": b'{"messages": [{"role": "user", "content": "hi"}]}'},
    "csv": {"a.csv": _csv("a"), "b.csv": _csv("b")},
    "csv with quotes": {"a.csv": b'text,n\r\n"a ""b"", c\r\nd",1\r\n\r\n  e  ,2\r\n'},
    "tsv": {"a.tsv": _csv("a", "\t")},
    "parquet": {"a.parquet": _parquet("a"), "b.parquet": _parquet("b")},
    "arrow": {"a.arrow": _arrow("a")},
    "text": {"a.txt": _txt("a"), "b.txt": b"b 0\n\nb 1"},
    "text of all line ends": {"a.txt": b"a\r\nb\rc\n\r\n\rd \x0b e\xc2\x85f\r"},
    **{f"jsonl.{ending}": {f"a.jsonl.{ending}": compress(_jsonl("a"))} for ending, compress in COMPRESS.items()},
    **{f"txt.{ending}": {f"a.txt.{ending}": compress(_txt("a"))} for ending, compress in COMPRESS.items()},
    "csv.gz": {"a.csv.gz": gzip.compress(_csv("a"))},
    "train and test": {"train.jsonl": _jsonl("train"), "test.jsonl": _jsonl("test")},
    "training and eval": {"my-training-1.jsonl": _jsonl("t"), "eval.jsonl": _jsonl("e"), "dev.jsonl": _jsonl("d")},
    "split directories": {"train/a.jsonl": _jsonl("a"), "train/b.jsonl": _jsonl("b"), "test/a.jsonl": _jsonl("t")},
    "directories that begin with a split": {"train_1/a.csv": _csv("a"), "val-2/a.csv": _csv("v")},
    "split names deep down": {"x/y/train/0.parquet": _parquet("a"), "x/y/validation/0.parquet": _parquet("v")},
    "shards": {
        "data/train-00001-of-00002.parquet": _parquet("b"),
        "data/train-00000-of-00002.parquet": _parquet("a"),
        "data/test-00000-of-00001.parquet": _parquet("t"),
        "data/odd-00000-of-00001.parquet": _parquet("o"),
    },
    "shards beside others": {"data/train-00000-of-00001.jsonl": _jsonl("a"), "extra.jsonl": _jsonl("e")},
    "a word that is no split": {"trainer.jsonl": _jsonl("a"), "latest.jsonl": _jsonl("b")},
    "the most common format": {"a.jsonl": _jsonl("a"), "b.jsonl": _jsonl("b"), "c.csv": _csv("c")},
    "as many of two formats": {"a.csv": _csv("a"), "b.parquet": _parquet("b")},
    "hidden files": {
        "a.jsonl": _jsonl("a"), ".b.jsonl": _jsonl("b"), ".git/c.jsonl": _jsonl("c"), "__x/d.jsonl": _jsonl("d"),
    },
    "descriptions": {"a.json": _json("a"), "dataset_infos.json": b"{}", "config.json": b"{}", "dataset_info.json": b"{}"},
    "upper and lower case": {"A.jsonl": _jsonl("A"), "a.jsonl": _jsonl("a"), "B.jsonl": _jsonl("B")},
    "README names files": {
        "README.md": _readme({"name": "default", "lines": ["  data_files: x/*.jsonl"]}),
        "x/a.jsonl": _jsonl("a"), "y/b.jsonl": _jsonl("b"),
    },
    "README names splits": {
        "README.md": _readme(
            {
                "name": "default",
                "lines": [
                    "  data_files:", "  - split: train", "    path: [c.jsonl, b.jsonl]", "  - split: rest",
                    "    path: a.jsonl",
                ],
            }
        ),
        "a.jsonl": _jsonl("a"), "b.jsonl": _jsonl("b"), "c.jsonl": _jsonl("c"),
    },
    "README with a default": {
        "README.md": _readme(
            {"name": "one", "lines": ["  data_files: one.jsonl"]},
            {"name": "two", "lines": ["  data_files: two.jsonl", "  default: true"]},
        ),
        "one.jsonl": _jsonl("1"), "two.jsonl": _jsonl("2"),
    },
    "README with a directory": {
        "README.md": _readme({"name": "default", "lines": ["  data_dir: in"]}),
        "in/train.csv": _csv("a"), "in/test.csv": _csv("t"), "train.csv": _csv("o"),
    },
    "README with a delimiter": {
        "README.md": _readme({"name": "default", "lines": ["  data_files: a.csv", '  sep: ";"']}),
        "a.csv": _csv("a", ";"),
    },
    "README with names of columns": {
        "README.md": _readme({"name": "default", "lines": ["  data_files: a.csv", "  column_names: [text, x]"]}),
        "a.csv": b"one,1\ntwo,2\n",
    },
    "README with a field": {
        "README.md": _readme({"name": "default", "lines": ["  data_files: a.json", "  field: rows"]}),
        "a.json": json.dumps({"rows": _rows("a"), "other": _rows("b")}).encode(),
    },
    "another description": {
        ".huggingface.yaml": b"configs:\n- config_name: default\n  data_files: b.jsonl\n",
        "a.jsonl": _jsonl("a"), "b.jsonl": _jsonl("b"),
    },
    "zip": {"a.zip": _zip({"x.jsonl": _jsonl("x"), "y/z.jsonl": _jsonl("z")})},
    "zips of splits": {"train.zip": _zip({"x.csv": _csv("x")}), "test.zip": _zip({"x.csv": _csv("t")})},
    "webdataset": {"train-0.tar": _tar(SAMPLES), "test-0.tar": _tar(dict(list(SAMPLES.items())[:3]))},
    "webdatasets": {"0.tar": _tar({"a.txt": b"a", "b.txt": b"b"}), "1.tar": _tar({"a.txt": b"c"})},
    "columns of all types": {
        "a.parquet": _parquet(
            "",
            [
                {
                    "text": "a", "f": 0.5, "b": True, "none": None, "l": [1, None], "s": {"x": [1.5]},
                    "t": datetime(2020, 1, 2, 3, 4, 5, 678901), "d": date(1960, 5, 6), "c": Decimal("1.10"),
                }
            ]
            * 3,
        )
    },
    "columns that come late": {"a.jsonl": b'{"text": "a"}\n{"text": "b", "late": [{"x": 1}]}\n'},
    "columns of mixed types": {"a.jsonl": b'{"text": "a", "x": 1}\n{"text": "b", "x": "s"}\n{"text": "c", "x": {"y": 2}}\n'},
    "blank lines": {"a.jsonl": b'{"text": "a"}\n\n \n{"text": "b"}\n{"text": ""}\n'},
}  # fmt: skip


@pytest.fixture
def write(tmp_path):
    def write(files, name="repo"):
        root = tmp_path / name
        for path, data in files.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(data)
        return root

    return write


def _load(path, tmp_path, split="train", **settings):
    return list(datasets.load_dataset(str(path), split=split, cache_dir=str(tmp_path / "cache"), **settings))


def _comparable(rows, *, as_text):
    """Without the columns that are null, which a line of JSON may lack; the rows without text left out."""
    kept = []
    for row in rows:
        plain = {}
        for name, value in row.items():
            try:
                value = json_value(value)
            except NotStorable:
                continue
            if name == "__url__":
                value = value.rpartition("/")[2]
            if isinstance(value, dict):
                value = {key: item for key, item in value.items() if item is not None}
            if value is not None:
                plain[name] = str(value) if as_text else value
        if any(str(plain.get(name, "")).strip() for name in ("text", "txt", "messages")):
            kept.append(plain)
    return kept


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_those_of_load_dataset(layout, write, tmp_path):
    root = write(LAYOUTS[layout])
    # Cells of CSV stay text, whatever `datasets` takes them for.
    as_text = any(".csv" in name or ".tsv" in name or "zips" in layout for name in LAYOUTS[layout])
    given = list(open_rows(root, text_column="txt" if layout.startswith("webd") else None))
    expected = _load(root, tmp_path)
    assert expected
    assert _comparable(given, as_text=as_text) == _comparable(expected, as_text=as_text)


@pytest.mark.parametrize(
    ("slice_", "expected"),
    [
        ("[:10%]", (0, 20)),
        ("[33%:67%]", (66, 134)),
        ("[-50:]", (150, 200)),
        ("[10:500]", (10, 200)),
        ("", (0, 200)),
    ],
)
def test_what_datasets_says_of_a_slice(slice_, expected):
    assert bounds(SplitPart("train", f"train{slice_}"), 200) == expected


def test_there_are_many_layouts():
    assert len(LAYOUTS) >= 40


@pytest.mark.parametrize("layout", ["train and test", "shards", "README with a default", "several files", "blank lines", "csv", "text", "zip", "train only in a part"])  # fmt: skip
@pytest.mark.parametrize(
    "split",
    ["train[:1]", "train[1:5]", "train[:34%]", "train[34%:67%]", "train[-2:]", "train[1:]", "train[:1000]"],
)
def test_slices_are_those_of_load_dataset(layout, split, write, tmp_path):
    files = LAYOUTS.get(layout, {f"{i}.jsonl": _jsonl(str(i), i) for i in range(5)})
    root = write(files)
    as_text = "csv" in layout
    expected = _comparable(_load(root, tmp_path, split), as_text=as_text)
    assert _comparable(open_rows(root, split=split), as_text=as_text) == expected
    assert _comparable(open_rows(f"{root}::{split}"), as_text=as_text) == expected


@pytest.mark.parametrize(
    "split", ["test", "train+test", "test+train", "train[:1]+test[1:]", "test[:50%]+train[50%:]"]
)
@pytest.mark.parametrize("layout", ["train and test", "split directories", "shards"])
def test_other_splits_and_sums(layout, split, write, tmp_path):
    root = write(LAYOUTS[layout])
    assert list(open_rows(root, split=split)) == _load(root, tmp_path, split)


@pytest.mark.parametrize("num_proc", [1, 2])
@pytest.mark.parametrize("ending", ["jsonl", "parquet", "txt", "csv"])
def test_a_slice_is_built_and_gone_on_with(ending, num_proc, write, tmp_path, read_all):
    rows = _rows("row", 1000)
    data = {
        "jsonl": _jsonl("row", 1000).replace(b'{"text": "row 3"', b'\n\n{"text": "row 3"'),
        "parquet": _parquet("row", rows),
        "txt": "".join(f"{row['text']}\n" for row in rows).encode(),
        "csv": ("text\n" + "".join(f"{row['text']}\n" for row in rows)).encode(),
    }[ending]
    root = write({f"a.{ending}": data, f"b.{ending}": data})
    location = f"{root}::train[10%:80%]"
    manifest = build_blocks(location, tmp_path / "out", samples_per_block=90, num_proc=num_proc)
    texts = [row["text"] for row in rows * 2][200:1600]
    assert [row["text"] for row in read_all(tmp_path / "out")] == texts
    assert manifest.source == "file:repo::train[10%:80%]"
    # A cursor anywhere continues with the same rows.
    source = open_source(location)
    for batch in list(source.batches(open_cursor()))[:2]:
        for count in range(0, len(batch.rows) + 1, 97):
            left = sum(len(b.rows) for b in source.batches(batch.after(count)))
            whole = sum(len(b.rows) for b in source.batches(batch.after(0)))
            assert left == whole - count


def open_cursor():
    from metaflow_hf.data.manifest import Cursor

    return Cursor()


STRICTER = {
    "LICENSE.txt": {"a.jsonl": _jsonl("a"), "LICENSE.txt": b"free\n", "requirements.txt": b"x\n", "README.txt": b"y\n"},
    "documents": {"a.jsonl": _jsonl("a"), "b.md": b"# b", "c.md": b"# c", "README.md": b"# about"},
    "old copies": {"a.jsonl": _jsonl("a"), "a.jsonl.bak": _jsonl("old"), "a.jsonl.lock": b""},
    "pictures": {"a.jsonl": _jsonl("a"), "b.png": b"\x89PNG", "c.png": b"\x89PNG"},
    "a script": {"a.jsonl": _jsonl("a"), "repo.py": b"raise"},
    "jsonlines": {"a.jsonlines": _jsonl("a")},
    "jsonlines.gz": {"a.jsonlines.gz": gzip.compress(_jsonl("a"))},
    "feather": {"a.feather": _feather("a")},
    "feather.bz2": {"a.feather.bz2": bz2.compress(_feather("a"))},
    "parquet.xz": {"a.parquet.xz": lzma.compress(_parquet("a"))},
    "arrow.zst": {"a.arrow.zst": zstandard.compress(_arrow("a"))},
    "JSONL": {"A.JSONL": _jsonl("a")},
    "wrapped": {"a.json": json.dumps({"version": "1", "data": _rows("a")}).encode()},
    "wrapped over lines": {"a.json": json.dumps({"version": "1", "data": _rows("a")}, indent=1).encode()},
    "tar of files": {"train.tar.gz": _tar({"./a.jsonl": _jsonl("a")}, "w:gz")},
}  # fmt: skip


@pytest.mark.parametrize("layout", STRICTER)
def test_where_more_is_read_or_less_than_datasets_does(layout, write):
    assert list(open_rows(write(STRICTER[layout]))) == _rows("a")


def test_what_is_left_out_for_its_format_is_said(write, caplog):
    list(open_rows(write(LAYOUTS["the most common format"])))
    assert "c.csv" in caplog.text
    assert "most common" in caplog.text


@pytest.mark.parametrize(
    ("files", "location", "said"),
    [
        ({"test.jsonl": _jsonl("t"), "dev.jsonl": _jsonl("d")}, "", "no split 'train'.*validation, test.*:default:SPLIT"),
        ({"a.jsonl": _jsonl("a")}, "::test", "no split 'test'.*only train"),
        ({"a.jsonl": _jsonl("a")}, ":english", "no configuration 'english', only default"),
        ({"a.jsonl": _jsonl("a")}, "::train[:x]", "is not a split: write train"),
        ({"a.jsonl": _jsonl("a")}, "::train[3:]", r"train\[3:\] holds no rows; split 'train' has 3"),
        ({"README.md": _readme({"name": "x", "lines": ["  data_files: a.jsonl"]}, {"name": "y", "lines": ["  data_files: b.jsonl"]}), "a.jsonl": _jsonl("a"), "b.jsonl": _jsonl("b")}, "", "several configurations: x, y"),
        ({"README.md": _readme({"name": "x", "lines": ["  data_files: a.txt", "  sample_by: paragraph"]}), "a.txt": _txt("a")}, "", "sample_by: 'paragraph'.*not supported"),
        ({"README.md": b"---\nconfigs: [\n---\n", "a.jsonl": _jsonl("a")}, "", "README.md is not YAML"),
        ({"a.png": b"x", "LICENSE.txt": b"x"}, "", "no files with rows of text"),
        ({"a.json": json.dumps({"x": _rows("a"), "y": _rows("b")}).encode()}, "", r"a.json.*several lists of objects \(x, y\)"),
        ({"a.json": b'{\n"text": "a",\n'}, "", "a.json: not a JSON object, or not complete"),
        ({"train.jsonl": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"}, "", "git lfs pull"),
    ],
)  # fmt: skip
def test_what_cannot_be_chosen_is_refused(files, location, said, write):
    with pytest.raises(SelectionError, match=said):
        list(open_rows(f"{write(files)}{location}"))


def test_the_only_split_is_taken(write):
    assert list(open_rows(write({"test.jsonl": _jsonl("t")}))) == _rows("t")


@pytest.mark.parametrize("name", ["a:b", "x::train[:1]"])
def test_a_path_that_exists_is_only_a_path(name, write):
    assert list(open_rows(write({"a.jsonl": _jsonl("a")}, name))) == _rows("a")


def test_configuration_and_split_of_a_path(write):
    root = write(LAYOUTS["README with a default"])
    assert list(open_rows(f"{root}:one")) == _rows("1")
    assert list(open_rows(f"{root}:one:train[:1]")) == _rows("1")[:1]
    assert open_source(f"{root}:one").source == "file:repo:one:train"


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.jsonl", "ab"), ("x/*.jsonl", "c"), ("**/*.jsonl", "abc"), ("[ab].jsonl", "ab"), ("*.jsonl::train[:2]", "ab"),
        ("y/*.jsonl", "t"), ("y/*.jsonl::test", "s"), ("y/*.jsonl::train+test", "ts"), ("*.txt", "z"),
    ],
)  # fmt: skip
def test_patterns(pattern, names, write):
    root = write(
        {
            "a.jsonl": _jsonl("a", 1), "b.jsonl": _jsonl("b", 1), "x/c.jsonl": _jsonl("c", 1), ".h.jsonl": b"no",
            "y/train.jsonl": _jsonl("t", 1), "y/test.jsonl": _jsonl("s", 1), "only.txt": b"z 0\n",
        }
    )  # fmt: skip
    if pattern == "**/*.jsonl":
        (root / "y/train.jsonl").unlink()
        (root / "y/test.jsonl").unlink()
    assert [row["text"][0] for row in open_rows(f"{root}/{pattern}")] == list(names)


@pytest.mark.parametrize("location", ["datasets/mine::test", "datasets/*.jsonl", "datasets/mine"])
def test_a_local_directory_is_no_key_of_a_dataset(location, write, tmp_path, monkeypatch):
    write(
        {"mine/train.jsonl": _jsonl("a"), "mine/test.jsonl": _jsonl("t"), "b.jsonl": _jsonl("b")}, "datasets"
    )
    monkeypatch.chdir(tmp_path)
    assert find_stored(location, open_store(tmp_path / "store")) is None
    assert len(list(open_rows(location))) == 3


def test_a_pattern_without_matches(tmp_path):
    with pytest.raises(SelectionError, match=r"\*\.jsonl"):
        open_rows(tmp_path / "*.jsonl")


def test_folders_of_save_to_disk(tmp_path):
    both = datasets.DatasetDict(
        {name: datasets.Dataset.from_list(_rows(name)) for name in ("test", "train", "other")}
    )
    both.save_to_disk(tmp_path / "saved")
    assert list(open_rows(tmp_path / "saved")) == _rows("train")
    assert list(open_rows(tmp_path / "saved", split="other[:2]+test")) == _rows("other")[:2] + _rows("test")
    assert list(open_rows(tmp_path / "saved/test", split="train[1:]")) == _rows("test")[1:]
    with pytest.raises(SelectionError, match="no split 'dev'.*test, train, other"):
        open_rows(f"{tmp_path}/saved::dev")
    del both["train"]
    both.save_to_disk(tmp_path / "two")
    with pytest.raises(SelectionError, match="no split 'train'.*test, other"):
        open_rows(tmp_path / "two")


def test_json_columns_of_datasets_are_decoded(tmp_path):
    rows = [{"text": "a", "x": 1, "m": [{"v": {"k": [1]}}]}, {"text": "b", "x": "s", "m": [{"v": "t"}]}]
    made = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
    made.save_to_disk(tmp_path / "saved")
    made.to_parquet(tmp_path / "a.parquet")
    assert list(open_rows(tmp_path / "saved")) == rows
    assert list(open_rows(tmp_path / "a.parquet")) == rows


@pytest.mark.parametrize("archive", ["raw.zip", "raw.tar", "raw.tar.gz"])
def test_archives_by_their_own_name(archive, write, tmp_path):
    files = {
        "train/a.jsonl": _jsonl("a"),
        "test/a.jsonl": _jsonl("t"),
        "LICENSE.txt": b"no",
        "README.md": b"no",
    }
    data = _zip(files) if archive.endswith("zip") else _tar(files, "w:gz" if archive.endswith("gz") else "w")
    (tmp_path / archive).write_bytes(data)
    assert list(open_rows(tmp_path / archive)) == _rows("a")
    assert list(open_rows(f"{tmp_path / archive}::test[1:]")) == _rows("t")[1:]
    assert list(open_rows(tmp_path / archive, split="test+train[:1]")) == _rows("t") + _rows("a")[:1]


def test_a_damaged_tar_is_named(tmp_path):
    (tmp_path / "raw.tar").write_bytes(_tar({"a.jsonl": _jsonl("a", 500)})[:3000])
    with pytest.raises(Exception, match="raw.tar") as error:
        list(open_rows(tmp_path / "raw.tar"))
    assert "damaged" in str(error.value)


def test_a_single_file_is_read_whatever_its_name(write):
    root = write({"test.txt": _txt("a"), "LICENSE.txt": b"free\n"})
    assert [row["text"] for row in open_rows(root / "test.txt")] == ["a 0", "a 1", "a 2"]
    assert list(open_rows(root / "LICENSE.txt")) == [{"text": "free"}]


@pytest.mark.parametrize("ending", ["md", "md.gz", "md.zst", "md.bz2", "md.xz"])
def test_documents_in_every_compression(ending, tmp_path):
    compress = COMPRESS.get(ending.partition(".")[2], bytes)
    (tmp_path / f"a.{ending}").write_bytes(compress(b"# Title\n\nwords\n"))
    (row,) = open_rows(tmp_path / f"a.{ending}")
    assert row["text"] == "# Title\n\nwords\n"


def test_rows_of_blocks_and_objects_of_a_store(write, tmp_path, memory_store):
    root = write(LAYOUTS["train and test"])
    build_blocks(root, tmp_path / "blocks", samples_per_block=2)
    assert list(open_rows(tmp_path / "blocks", split="train[1:]")) == _rows("train")[1:]
    for name in ("train.jsonl", "test.jsonl"):
        memory_store.put(f"raw/{name}", (root / name).read_bytes())
    memory_store.put("raw/LICENSE.txt", b"no")
    uri = f"{memory_store.uri}/raw"
    assert list(open_rows(uri)) == _rows("train")
    assert list(open_rows(f"{uri}::test[:2]")) == _rows("test")[:2]
    assert list(open_rows(uri, split="test")) == _rows("test")
    assert list(open_rows(f"{uri}/test.jsonl")) == _rows("test")


def test_all_rows_come_where_the_text_is_unclear(write):
    rows = [{"prompt": "p", "completion": "c"}, {"prompt": "", "completion": ""}]
    root = write({"a.jsonl": "\n".join(map(json.dumps, rows)).encode()})
    assert list(open_rows(root)) == rows
    assert list(open_rows(root, text_column="prompt", keep_columns=[])) == [{"prompt": "p"}]


def test_a_build_keeps_the_same_rows(write, read_through_manager, tmp_path):
    for layout in ("shards", "blank lines", "webdataset", "columns of all types"):
        root = write(LAYOUTS[layout], layout)
        column = "txt" if layout == "webdataset" else "text"
        build_blocks(root, tmp_path / f"out {layout}", text_column=column)
        with BlockManager(tmp_path / f"out {layout}", text_column=column) as blocks:
            assert blocks.get_rows(0, 0) == list(open_rows(root, text_column=column))
