"""A text dataset from documentation that lies on every Python installation.

Documents are the topics of Python's language reference (``pydoc_data.topics``) and, one per module, the
docstrings of the standard library, read from the sources without importing them. A document belongs to the
held-out split or to the training split as a whole, and no docstring occurs twice, so nothing of the held-out
text is trained on. The result depends on the Python version and on nothing else.
"""

import ast
import hashlib
import importlib.util
import inspect
import json
import logging
import sys
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

_LOGGER = logging.getLogger("metaflow_hf.demo")

MIN_ROW_CHARS = 500
MAX_ROW_CHARS = 2000
HELD_OUT_ONE_IN = 16
NUM_TRAIN_SHARDS = 2
_SKIPPED_MODULES = frozenset(
    {"encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "test", "turtledemo"}
)
_SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "__pycache__"})
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef

README = """---
license: psf-2.0
language:
- en
pretty_name: Documentation of Python
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
  - split: test
    path: data/test-*
---
# Documentation of Python

The language reference and the docstrings of the standard library of the Python that serves this dataset, in
rows of a paragraph to a page: `text`, and the `source` it comes from. Whole documents are held out in `test`.
"""


@dataclass(frozen=True, slots=True)
class Row:
    text: str
    source: str


@dataclass(frozen=True, slots=True)
class Corpus:
    """Rows of both splits, in a fixed order."""

    train: tuple[Row, ...]
    test: tuple[Row, ...]


def python_docs(stdlib: Path | None = None) -> Corpus:
    """The corpus of this Python (or of another standard library's folder); takes a few seconds.

    Raises FileNotFoundError when the installation has no sources of the standard library.
    """
    stdlib = stdlib or Path(sysconfig.get_path("stdlib"))
    train: list[Row] = []
    test: list[Row] = []
    seen: set[str] = set()
    rows: set[str] = set()
    for source, entries in _documents(stdlib):
        fresh = []
        for heading, doc in entries:
            if doc not in seen:
                seen.add(doc)
                fresh.append(f"{heading}\n\n{doc}" if heading else doc)
        split = test if _is_held_out(source) else train
        for text in pack("\n\n".join(fresh)):
            if text not in rows:
                rows.add(text)
                split.append(Row(text, source))
    if not train:
        raise FileNotFoundError(
            f"no documentation found in {stdlib}: this Python lies here without its sources"
        )
    return Corpus(tuple(train), tuple(test))


def _is_held_out(source: str) -> bool:
    digest = hashlib.sha256(source.encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0


def _documents(stdlib: Path) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Each document's name and its entries: heading and text."""
    for topic, text in _topics():
        yield f"reference/{topic}", [("", text.strip("\n"))]
    for path in _sources(stdlib):
        name = path.relative_to(stdlib)
        yield f"library/{name.as_posix()}", list(_docstrings(path, name))


def _sources(stdlib: Path) -> Iterator[Path]:
    """The files of the standard library's own modules; others that were put beside them do not count."""
    for name in sorted(sys.stdlib_module_names - _SKIPPED_MODULES):
        module = stdlib / f"{name}.py"
        if module.is_file():
            yield module
        for path in sorted((stdlib / name).rglob("*.py"), key=Path.as_posix):
            if _SKIPPED_FOLDERS.isdisjoint(path.relative_to(stdlib).parts):
                yield path


def _topics() -> Iterable[tuple[str, str]]:
    if importlib.util.find_spec("pydoc_data") is None:  # some distributions package it apart
        return []
    from pydoc_data.topics import topics

    return sorted(topics.items())


def _docstrings(path: Path, name: Path) -> Iterator[tuple[str, str]]:
    """Each documented definition as pydoc would head it, in the order of the source."""
    try:
        with tokenize.open(path) as file:
            tree = ast.parse(file.read())
    except (SyntaxError, UnicodeDecodeError) as error:
        _LOGGER.debug("%s is not read: %s", path, error)
        return
    module = ".".join(name.with_suffix("").parts).removesuffix(".__init__")
    yield from _entries(tree, module)


def _entries(node: _Documented, qualified: str) -> Iterator[tuple[str, str]]:
    doc = ast.get_docstring(node, clean=False)
    if doc and doc.strip():
        yield _heading(node, qualified), inspect.cleandoc(doc)
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _entries(child, f"{qualified}.{child.name}")


def _heading(node: _Documented, qualified: str) -> str:
    match node:
        case ast.Module():
            return f"module {qualified}"
        case ast.ClassDef():
            return f"class {qualified}({', '.join(ast.unparse(b) for b in node.bases)})"
        case _:
            return f"{qualified}({ast.unparse(node.args)})"


def pack(text: str) -> Iterator[str]:
    """Consecutive rows of `MIN_ROW_CHARS` to `MAX_ROW_CHARS` characters, cut between paragraphs where there is
    such a place, else between lines or words. A rest that is too short for a row is left out.
    """
    while len(text) > MAX_ROW_CHARS:
        window = text[: MAX_ROW_CHARS + 1]
        cuts = (window.rfind(mark, MIN_ROW_CHARS) for mark in ("\n\n", "\n", " "))
        cut = next((c for c in cuts if c >= 0), MAX_ROW_CHARS)
        yield text[:cut]
        text = text[cut:].lstrip("\n")
    if len(text) >= MIN_ROW_CHARS:
        yield text


def jsonl(rows: Iterable[Row]) -> bytes:
    return "".join(
        json.dumps({"text": r.text, "source": r.source}, ensure_ascii=False) + "\n" for r in rows
    ).encode()


def dataset_files(corpus: Corpus) -> dict[str, bytes]:
    """The repository of the dataset: a README that declares the splits, and JSONL shards."""
    files = {"README.md": README.encode()}
    size = -(-len(corpus.train) // NUM_TRAIN_SHARDS)
    for i in range(NUM_TRAIN_SHARDS):
        shard = corpus.train[i * size : (i + 1) * size]
        files[f"data/train-{i:05d}-of-{NUM_TRAIN_SHARDS:05d}.jsonl"] = jsonl(shard)
    files["data/test-00000-of-00001.jsonl"] = jsonl(corpus.test)
    return files
