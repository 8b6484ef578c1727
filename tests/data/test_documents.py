"""Documents become rows of text that say where they came from; what cannot be read is named, never guessed."""

import io
import random
import subprocess
import sys

import pytest

from data.printed import Printed, plain_pdf
from metaflow_hf.data import BlockManager, build_blocks
from metaflow_hf.demo.content import HubContent
from metaflow_hf.errors import BadRowError, SelectionError, UnsupportedModalityError

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
    document.add_paragraph("Last.")
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
    assert (manifest.total_samples, manifest.skipped_rows, manifest.text_column) == (5, 1, "text")
    pdf_1, pdf_3, docx_row, html_row, markdown = read_all(tmp_path / "out")
    about = {"source": "a.pdf", "format": "pdf", "title": "Letters", "pages": 3}
    assert pdf_1 == {"text": "page one", "page": 1, **about}
    assert pdf_3 == {"text": "page three", "page": 3, **about}
    whole = {"part": 1, "parts": 1}
    assert docx_row == {
        "text": "Results\nFirst paragraph.\na b\n1\t2\nLast.",
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
        assert blocks.get_chunk(0, 0)[0] == "page one"


def test_an_interrupted_build_goes_on_within_a_document(tmp_path):
    (tmp_path / "long.pdf").write_bytes(pdf(*(f"page {n}" for n in range(60))))
    whole = build_blocks(tmp_path / "long.pdf", tmp_path / "whole", samples_per_block=10)

    class Stopped(Exception):
        pass

    def stop(manifest):
        if manifest.total_blocks == 3:
            raise Stopped

    with pytest.raises(Stopped):
        build_blocks(tmp_path / "long.pdf", tmp_path / "out", samples_per_block=10, progress=stop)
    resumed = build_blocks(tmp_path / "long.pdf", tmp_path / "out", samples_per_block=10)
    assert (resumed.total_samples, resumed.digest) == (60, whole.digest)


def test_documents_beside_files_of_rows_are_left_out(documents, tmp_path, read_all):
    (documents / "rows.jsonl").write_text('{"text": "a row"}\n')
    build_blocks(documents, tmp_path / "out")
    assert read_all(tmp_path / "out") == [{"text": "a row"}]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("locked.pdf", lambda: pdf("secret", password="word"), "encrypted"),
        ("broken.pdf", lambda: pdf("text")[:60], "PDF"),
        ("none.docx", lambda: b"no zip", "Word"),
        ("latin.md", lambda: "é".encode("latin-1"), "Markdown"),
    ],
)
def test_a_document_that_cannot_be_read_is_named_or_skipped(name, content, reason, documents, tmp_path):
    (documents / name).write_bytes(content())
    with pytest.raises(BadRowError, match=f"{name}: row 0.*{reason}"):
        build_blocks(documents, tmp_path / "out")
    manifest = build_blocks(documents, tmp_path / "skipped", on_bad_row="skip")
    assert (manifest.total_samples, manifest.skipped_rows) == (5, 2)


def test_a_pdf_encrypted_without_a_password_is_read(tmp_path, read_all):
    (tmp_path / "a.pdf").write_bytes(pdf("open to all", password=""))
    build_blocks(tmp_path / "a.pdf", tmp_path / "out")
    assert read_all(tmp_path / "out")[0]["text"] == "open to all"


def test_a_document_of_pictures_is_counted_and_said(tmp_path, caplog):
    (tmp_path / "d").mkdir()
    (tmp_path / "d/scan.pdf").write_bytes(pdf("", ""))
    (tmp_path / "d/text.md").write_text("text")
    manifest = build_blocks(tmp_path / "d", tmp_path / "out")
    assert (manifest.total_samples, manifest.skipped_rows) == (1, 2)
    assert any("scan.pdf holds no text" in message for message in caplog.messages)


@pytest.mark.parametrize(
    "make", [lambda: pdf("one", "two"), word, lambda: HTML.encode()], ids=["pdf", "docx", "html"]
)
def test_damaged_bytes_never_raise_anything_else(make, tmp_path):
    from metaflow_hf.data.manifest import Cursor
    from metaflow_hf.data.sources.documents import read_document
    from metaflow_hf.data.sources.local import LocalFile

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
sys.modules["pypdf"] = None
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
