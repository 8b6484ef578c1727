"""The text dataset: what a row is, what is held out, and that it is the same in every process."""

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metaflow_hf.demo.catalog import DATASET_ID, MODEL_ID, demo_content
from metaflow_hf.demo.corpus import MAX_ROW_CHARS, MIN_ROW_CHARS, Corpus, dataset_files, pack, python_docs
from metaflow_hf_cli.fixtures import fixture_content


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return python_docs()


def test_rows_are_of_paragraph_to_page_size_and_enough(corpus):
    for row in (*corpus.train, *corpus.test):
        assert MIN_ROW_CHARS <= len(row.text) <= MAX_ROW_CHARS
        assert row.source
    assert sum(len(row.text.encode()) for row in corpus.train) > 1_500_000
    assert sum(len(row.text.encode()) for row in corpus.test) > 50_000


def test_no_text_occurs_twice_and_no_document_is_in_both_splits(corpus):
    texts = [row.text for row in (*corpus.train, *corpus.test)]
    assert len(set(texts)) == len(texts)
    assert {r.source for r in corpus.train}.isdisjoint(r.source for r in corpus.test)


def test_little_of_the_held_out_text_can_be_copied_from_the_training_text(corpus):
    """Paragraphs of a certain length should not recur (1.2 % do, e.g. of deprecation notes)."""
    trained = {p for row in corpus.train for p in row.text.split("\n\n") if len(p) >= 80}
    held_out = [p for row in corpus.test for p in row.text.split("\n\n") if len(p) >= 80]
    assert sum(p in trained for p in held_out) / len(held_out) < 0.02


def test_nothing_but_the_standard_library_is_read(corpus, tmp_path):
    assert not any("site-packages" in row.source for row in corpus.train)
    (tmp_path / "not_a_stdlib_module.py").write_text(f'"""{"Not documentation. " * 50}"""')
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "__init__.py").write_text(f'"""{"Documentation of json. " * 50}"""')
    (tmp_path / "csv.py").write_text("this is not Python")
    sources = {row.source for row in (*python_docs(tmp_path).train, *python_docs(tmp_path).test)}
    assert {s for s in sources if s.startswith("library/")} == {"library/json/__init__.py"}


def test_a_docstring_that_two_modules_share_is_told_once(tmp_path):
    shared = "The same words in two modules. " * 30
    (tmp_path / "csv.py").write_text(f'"""{shared}"""')
    (tmp_path / "json.py").write_text(f'"""{shared}"""\ndef dump():\n    """{"Only here. " * 60}"""')
    corpus = python_docs(tmp_path)
    rows = [row for row in (*corpus.train, *corpus.test) if row.source.startswith("library/")]
    assert sum("The same words" in row.text for row in rows) == 1
    assert sum("json.dump()" in row.text for row in rows) == 1


@given(st.text(st.sampled_from("ab \n"), max_size=9000))
def test_packing_keeps_the_text_in_order(text):
    rows = list(pack(text))
    position = 0
    for row in rows:
        assert MIN_ROW_CHARS <= len(row) <= MAX_ROW_CHARS
        position = text.index(row, position) + len(row)
    rest = text[position:]
    assert len(rest.strip("\n")) < MIN_ROW_CHARS
    assert sum(map(len, rows)) + len(rest) + text.count("\n") >= len(text)


def test_files_are_jsonl_shards_that_hold_every_row(corpus):
    files = dataset_files(corpus)
    rows = [
        json.loads(line) for name in sorted(files) if "train" in name for line in files[name].splitlines()
    ]
    assert [(r["text"], r["source"]) for r in rows] == [(r.text, r.source) for r in corpus.train]
    assert len([name for name in files if "train" in name]) == 2


COMMITS = """
import json
from metaflow_hf_cli.fixtures import fixture_content
content = fixture_content()
repos = [*content.repos("model"), *content.repos("dataset")]
print(json.dumps({r.repo_type + " " + r.repo_id: r.resolve().sha for r in repos}))
"""


def test_every_commit_is_the_same_in_every_process(subprocess_environment, tmp_path):
    """Neither the hash seed (sets, BPE training) nor the current directory or locale may leak into the content."""
    environment = {
        **subprocess_environment,
        "PYTHONHASHSEED": "12345",
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
    }
    output = subprocess.check_output(
        [sys.executable, "-c", COMMITS], env=environment, cwd=tmp_path, text=True
    )
    content = fixture_content()
    repos = [*content.repos("model"), *content.repos("dataset")]
    assert json.loads(output) == {f"{r.repo_type} {r.repo_id}": r.resolve().sha for r in repos}
    assert len(repos) > 30


def test_the_default_content_is_the_same_with_and_without_fixtures(hub):
    content = demo_content()
    for repo_type, repo_id in (("model", MODEL_ID), ("dataset", DATASET_ID)):
        ours, theirs = (c.repo(repo_id, repo_type=repo_type).resolve().sha for c in (content, hub.content))
        assert ours == theirs
    assert len(content.repos("model")) == len(content.repos("dataset")) == 1
