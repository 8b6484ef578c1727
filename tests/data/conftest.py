"""Shared by the tests of data: small datasets, stores that count and fail, and a plain way to read blocks back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metaflow_hf.data import BlockManager
from metaflow_hf.store import open_store


@pytest.fixture(autouse=True)
def _own_node_cache(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("METAFLOW_HF_CACHE", str(tmp_path / "node-cache"))


@pytest.fixture
def make_rows() -> Callable[[int], list[dict[str, Any]]]:
    """Rows of unequal length, with what JSON escapes and what line splitters stumble over."""

    def make(count: int) -> list[dict[str, Any]]:
        return [
            {
                "text": f"row {i} \u2028 \x85 \x1c é \U0001f600 \\n \x00" + "x" * (i * 7 % 50),
                "n": i,
                "t": [i, None],
            }
            for i in range(count)
        ]

    return make


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    def write(rows: list[dict[str, Any]], name: str = "raw.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows))
        return path

    return write


@pytest.fixture
def read_all() -> Callable[..., list[dict[str, Any]]]:
    """Every row of a dataset, read the plain way: block files in order, line by line."""

    def read(directory: Path) -> list[dict[str, Any]]:
        blocks = sorted((directory / "blocks").glob("block_*.jsonl"))
        return [json.loads(line) for block in blocks for line in block.read_bytes().split(b"\n")[:-1]]

    return read


@pytest.fixture
def read_through_manager() -> Callable[..., list[str]]:
    def read(path: Any, chunk: int = 7, **settings: Any) -> list[str]:
        with BlockManager(path, dataset_chunk_size=chunk, **settings) as manager:
            return [
                text
                for block_id in range(manager.get_total_blocks())
                for chunk_id in range(manager.get_block(block_id).chunk_count(chunk))
                for text in manager.get_chunk(block_id, chunk_id)
            ]

    return read


class RecordingStore:
    """A store that notes every call as ``(method, key)``, and does first what ``before`` says."""

    def __init__(self, inner: Any, before: Callable[[str, str, int], None] = lambda *_: None) -> None:
        self._inner = inner
        self._before = before
        self.calls: list[tuple[str, str]] = []

    @property
    def uri(self) -> str:
        return self._inner.uri

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._inner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            key = str(args[1] if name == "take" else args[0] if args else "")
            self._before(name, key, len(self.calls))
            self.calls.append((name, key))
            return method(*args, **kwargs)

        return call


@pytest.fixture
def recording_store() -> type[RecordingStore]:
    return RecordingStore


@pytest.fixture
def memory_store(request: pytest.FixtureRequest) -> Any:
    return open_store(f"memory://{request.node.name.replace('[', '-').replace(']', '')}-{id(request)}")
