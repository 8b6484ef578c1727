"""Documents become rows of text that say where they came from; what cannot be read is named, never guessed."""

import io
import json
import random
import subprocess
import sys

import pytest
from data.printed import plain_pdf

from metaflow_hf.config import DataConfig
from metaflow_hf.data import BlockManager, build_blocks
from metaflow_hf.data.build import dataset_key, plan_dataset
from metaflow_hf.data.manifest import Cursor
from metaflow_hf.data.records import read_manifest
from metaflow_hf.data.sharded import ShardedDataset
from metaflow_hf.data.sources import open_source
from metaflow_hf.data.sources.documents import read_document
from metaflow_hf.data.sources.local import LocalFile
from metaflow_hf.demo.content import HubContent
from metaflow_hf.errors import (
    BadRowError,
    ConfigError,
    DatasetMismatch,
    SelectionError,
    UnsupportedModalityError,
)
from metaflow_hf.store import open_store
from metaflow_hf.train.blocks import build_source

HTML = """<!doctype html><html><head><title>A  page</title><style>p {}</style></head><body>
<nav>Menu</nav><h1>Heading &amp; more</h1><p>One <b>bold</b>
sentence,<br>cut.</p><script>evil()</script>
<table><tr><th>a</th><th>b</th></tr><tr><td></td><td>2</td></tr></table>
<pre>def f():
    return "é"
</pre><ul><li>x</li><li>y</li></ul></body></html>"""
HTML_TEXT = 'Heading & more\n\nOne bold sentence,\ncut.\n\na\tb\n\t2\n\ndef f():\n    return "é"\n\nx\ny'


def word() -> bytes:
    import docx

    document = docx.Document()
    document.core_properties.title = "Report"
    document.add_heading("Results", 1)
    document.add_paragraph("First paragraph.")
    table = document.add_table(2, 2)
    for cell, text in zip([c for row in table.rows for c in row.cells], ["a", "b", "1", "2"], strict=True):
        cell.text = text
    table.rows[0].cells[0].merge(table.rows[0].cells[1])
    document.add_paragraph("One", style="List Bullet")
    document.add_paragraph("Two", style="List Bullet")
    document.add_paragraph("")
    document.add_paragraph("Step", style="List Number")
    document.add_paragraph("Next step", style="List Number")
    document.add_paragraph("Last.")
    document.sections[0].header.paragraphs[0].text = "On every page"
    document.sections[0].footer.paragraphs[0].text = "Page 1"
    out = io.BytesIO()
    document.save(out)
    return out.getvalue()


@pytest.fixture
def documents(tmp_path):
    directory = tmp_path / "documents"
    (directory / "deep").mkdir(parents=True)
    (directory / "a.pdf").write_bytes(plain_pdf(["First letter.", "", "Third letter."]))
    (directory / "b.docx").write_bytes(word())
    (directory / "deep/c.html").write_text(HTML)
    (directory / "deep/d.md").write_text("# Notes\n\n- kept *as is*\n")
    (directory / "README.md").write_text("about these files")
    (directory / "cover.png").write_bytes(b"\x89PNG")
    return directory


def test_a_directory_of_documents_becomes_rows_with_provenance(documents, tmp_path, read_all):
    manifest = build_blocks(documents, tmp_path / "out")
    assert (manifest.total_samples, manifest.skipped_rows, manifest.text_column) == (4, 0, "text")
    pdf, docx_row, html_row, markdown = read_all(tmp_path / "out")
    whole = {"part": 1, "parts": 1}
    assert pdf == {
        "text": "First letter.\n\nThird letter.",
        "source": "a.pdf",
        "format": "pdf",
        "title": "Letters",
        "pages": 3,
        **whole,
    }
    assert docx_row == {
        "text": "Results\n\nFirst paragraph.\n\na b\n1\t2\n\n• One\n• Two\n\n1. Step\n2. Next step\n\nLast.",
        "source": "b.docx",
        "format": "docx",
        "title": "Report",
        **whole,
    }
    about = {"source": "deep/c.html", "format": "html", "title": "A page", **whole}
    assert html_row == {"text": HTML_TEXT, **about}
    assert markdown["text"] == "# Notes\n\n- kept *as is*\n"
    assert (markdown["source"], markdown["title"]) == ("deep/d.md", "Notes")
    with BlockManager(tmp_path / "out") as blocks:
        assert blocks.get_chunk(0, 0)[0] == pdf["text"]


def test_with_pages_each_page_of_a_pdf_is_a_row(documents, tmp_path, read_all):
    manifest = build_blocks(documents, tmp_path / "out", documents="pages")
    assert (manifest.total_samples, manifest.skipped_rows) == (5, 1)
    first, third, *others = read_all(tmp_path / "out")
    about = {"source": "a.pdf", "format": "pdf", "title": "Letters", "pages": 3}
    assert first == {"text": "First letter.", "page": 1, **about}
    assert third == {"text": "Third letter.", "page": 3, **about}
    build_blocks(documents, tmp_path / "whole")
    assert others == read_all(tmp_path / "whole")[1:]


def test_the_setting_is_part_of_the_key_only_where_it_changes_rows(documents, tmp_path):
    def key(path, **settings):
        return dataset_key(plan_dataset(open_source(path, **settings), samples_per_block=10))

    assert key(documents) != key(documents, documents="pages")
    (documents / "a.pdf").unlink()
    assert key(documents) == key(documents, documents="pages")
    (tmp_path / "rows.jsonl").write_text('{"text": "a row"}\n')
    spec = plan_dataset(open_source(tmp_path / "rows.jsonl"), samples_per_block=10)
    assert not {"documents", "document_rules"} & set(spec.to_json())


def test_other_settings_than_those_of_the_source_are_refused(documents):
    source = open_source(documents)
    assert plan_dataset(source, samples_per_block=10, documents="whole").documents == "whole"
    with pytest.raises(ConfigError, match="documents is 'pages', but the source was opened with 'whole'"):
        plan_dataset(source, samples_per_block=10, documents="pages")
    with pytest.raises(ConfigError, match="documents must be 'whole' or 'pages', got 'page'"):
        open_source(documents, documents="page")


@pytest.mark.parametrize("settings", [{"documents": "whole"}, {"documents": "pages"}])
def test_several_processes_build_the_same(settings, documents, tmp_path):
    for number in range(3):
        (documents / f"more{number}.pdf").write_bytes(plain_pdf([f"Letter {number} to you.", "Yours."]))
    alone = build_blocks(documents, tmp_path / "alone", samples_per_block=3, **settings)
    together = build_blocks(documents, tmp_path / "together", samples_per_block=3, num_proc=2, **settings)
    assert alone.digest == together.digest


@pytest.mark.parametrize("settings", [{"documents": "whole"}, {"documents": "pages"}])
def test_shards_are_built_with_the_setting_of_their_plan(settings, documents, tmp_path):
    plan = ShardedDataset.plan(documents, samples_per_block=10, **settings)
    store = open_store(tmp_path / "sharded")
    carried = ShardedDataset.from_json(json.loads(json.dumps(plan.to_json())))
    carried.build(range(len(plan.sizes)), store)
    whole = build_blocks(documents, tmp_path / "out", samples_per_block=10, **settings)
    assert carried.assemble(store).digest == whole.digest


def test_a_build_goes_on_only_with_the_setting_that_it_began_with(documents, tmp_path):
    build_blocks(documents, tmp_path / "out", documents="pages")
    with pytest.raises(DatasetMismatch, match="documents: stored 'pages', asked for 'whole'"):
        build_blocks(documents, tmp_path / "out")


def test_a_configuration_decides(documents, tmp_path, monkeypatch):
    monkeypatch.setattr("metaflow_hf.train.blocks.configured_store", lambda: open_store(tmp_path / "store"))
    monkeypatch.setattr("metaflow_hf.data.build.datasets_root", lambda: open_store(tmp_path / "store"))
    keys = {
        setting: build_source(str(documents), DataConfig(documents=setting)) for setting in ("whole", "pages")
    }
    counts = {
        setting: read_manifest(open_store(tmp_path / "store").child(key)).total_samples
        for setting, key in keys.items()
    }
    assert counts == {"whole": 4, "pages": 5}


def test_an_interrupted_build_goes_on_within_a_document(tmp_path):
    settings = {"samples_per_block": 10, "documents": "pages"}
    (tmp_path / "long.pdf").write_bytes(plain_pdf([f"This is letter {n * n}." for n in range(60)]))
    whole = build_blocks(tmp_path / "long.pdf", tmp_path / "whole", **settings)

    class Stopped(Exception):
        pass

    def stop(manifest):
        if manifest.total_blocks == 3:
            raise Stopped

    with pytest.raises(Stopped):
        build_blocks(tmp_path / "long.pdf", tmp_path / "out", progress=stop, **settings)
    resumed = build_blocks(tmp_path / "long.pdf", tmp_path / "out", **settings)
    assert (resumed.total_samples, resumed.digest) == (60, whole.digest)


def test_an_interrupted_build_reads_no_document_twice(documents, tmp_path, monkeypatch):
    for number in range(4):
        (documents / f"a{number}.pdf").write_bytes(plain_pdf([f"Letter {number}."]))
    whole = build_blocks(documents, tmp_path / "whole", samples_per_block=2)

    class Stopped(Exception):
        pass

    def stop(manifest):
        raise Stopped

    with pytest.raises(Stopped):
        build_blocks(documents, tmp_path / "out", samples_per_block=2, progress=stop)
    opened, original = [], LocalFile.open
    monkeypatch.setattr(LocalFile, "open", lambda file: (opened.append(file.name), original(file))[1])
    assert build_blocks(documents, tmp_path / "out", samples_per_block=2).digest == whole.digest
    assert opened.count("a0.pdf") == 0
    assert opened.count("a2.pdf") == 1


def test_documents_beside_files_of_rows_are_left_out(documents, tmp_path, read_all):
    (documents / "rows.jsonl").write_text('{"text": "a row"}\n')
    build_blocks(documents, tmp_path / "out")
    assert read_all(tmp_path / "out") == [{"text": "a row"}]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("locked.pdf", lambda: plain_pdf(["secret"], password="word"), "encrypted"),
        ("broken.pdf", lambda: plain_pdf(["text"])[:60], "PDF"),
        ("none.docx", lambda: b"no zip", "Word"),
        ("latin.md", lambda: "é".encode("latin-1"), "Markdown"),
    ],
)
def test_a_document_that_cannot_be_read_is_named_or_skipped(name, content, reason, documents, tmp_path):
    (documents / name).write_bytes(content())
    with pytest.raises(BadRowError, match=f"{name}: row 0.*{reason}"):
        build_blocks(documents, tmp_path / "out")
    manifest = build_blocks(documents, tmp_path / "skipped", on_bad_row="skip")
    assert (manifest.total_samples, manifest.skipped_rows) == (4, 1)


def test_a_pdf_encrypted_without_a_password_is_read(tmp_path, read_all):
    (tmp_path / "a.pdf").write_bytes(plain_pdf(["open to all"], password=""))
    build_blocks(tmp_path / "a.pdf", tmp_path / "out")
    assert read_all(tmp_path / "out")[0]["text"] == "open to all"


def test_a_document_of_pictures_is_counted_and_said(tmp_path, caplog):
    (tmp_path / "d").mkdir()
    (tmp_path / "d/scan.pdf").write_bytes(plain_pdf(["", ""]))
    (tmp_path / "d/text.md").write_text("text")
    manifest = build_blocks(tmp_path / "d", tmp_path / "out")
    assert (manifest.total_samples, manifest.skipped_rows) == (1, 1)
    assert any("scan.pdf holds no text" in message for message in caplog.messages)


@pytest.mark.parametrize(
    "make", [lambda: plain_pdf(["one", "two"]), word, lambda: HTML.encode()], ids=["pdf", "docx", "html"]
)
def test_damaged_bytes_never_raise_anything_else(make, tmp_path):

    whole, chance = make(), random.Random(0)
    path = tmp_path / f"x.{ {b'%': 'pdf', b'P': 'docx', b'<': 'html'}[whole[:1]] }"
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 20)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(data[: chance.randint(1, len(data))] if chance.random() < 0.5 else data)
        for batch in read_document(LocalFile(path.name, path), Cursor()):
            assert batch.rows


def test_without_the_extra_the_error_says_what_to_install(documents, tmp_path):
    program = f"""
import sys
sys.modules["pypdfium2"] = None
from metaflow_hf.data import build_blocks
build_blocks({str(documents)!r}, {str(tmp_path / "out")!r})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "ConfigError: a.pdf: reading pdf needs the extra for documents" in done.stderr
    assert "pip install 'metaflow-hf[documents]'" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_repository_of_documents_is_a_source(start_hub, documents, tmp_path, read_all):
    content = HubContent()
    files = {
        file.relative_to(documents).as_posix(): file.read_bytes()
        for file in documents.rglob("*")
        if file.is_file() and file.suffix != ".png"
    }
    content.add("acme/letters", lambda: files, repo_type="dataset", tags=("modality:document",))
    start_hub(content)
    manifest = build_blocks("hf://acme/letters", tmp_path / "hub")
    assert manifest.commit_hash
    build_blocks(documents, tmp_path / "local")
    assert read_all(tmp_path / "hub") == read_all(tmp_path / "local")


def test_modalities_decide_before_anything_is_downloaded(start_hub, tmp_path):
    content = HubContent()
    rows = {"data/train.jsonl": b'{"text": "words"}\n', "docs/about.md": b"no rows"}
    content.add("acme/both", lambda: rows, repo_type="dataset", tags=("modality:image", "modality:text"))
    content.add("acme/untold", lambda: rows, repo_type="dataset")
    content.add("acme/table", lambda: rows, repo_type="dataset", tags=("modality:tabular",))
    pictures = {"0.png": b"png", "docs/about.md": b"about"}
    content.add("acme/pictures", lambda: pictures, repo_type="dataset", tags=("modality:image",))
    scans = {"data.bin": b"scans"}
    content.add("acme/scans", lambda: scans, repo_type="dataset", tags=("modality:document",))
    hub = start_hub(content)
    assert build_blocks("hf://acme/both", tmp_path / "both").total_samples == 1
    assert build_blocks("hf://acme/untold", tmp_path / "untold").total_samples == 1
    for name, words in (
        ("table", "holds tabular data.*only text can be trained on"),
        ("pictures", "holds image data"),
        ("scans", "holds document data.*extracted first.*datasets download acme/scans"),
    ):
        with hub.log.new() as log, pytest.raises(UnsupportedModalityError, match=words):
            BlockManager(f"hf://acme/{name}", cache_dir=tmp_path / "cache")
        assert not log.count(path="*/resolve/*", method="GET")


def test_a_directory_without_anything_readable(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(SelectionError, match="pdf"):
        build_blocks(tmp_path, tmp_path / "out")
