"""Many tasks of one node want one blob: one brings it, and it does not matter if that one dies."""

import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from metaflow_hf.errors import IntegrityError
from metaflow_hf.store import open_store, work_dirs
from metaflow_hf.store.blobs import Blobs, hash_file
from metaflow_hf.store.manifests import ManifestFile
from metaflow_hf.store.node_cache import NodeCache


class Slow:
    """A store whose downloads take a moment and are counted."""

    def __init__(self, inner: Any, seconds: float = 0.2) -> None:
        self._inner, self._seconds = inner, seconds
        self.downloads = 0
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def download(self, *arguments, **keywords):
        with self._lock:
            self.downloads += 1
        time.sleep(self._seconds)
        return self._inner.download(*arguments, **keywords)


@pytest.fixture
def store(tmp_path: Path) -> Slow:
    return Slow(open_store(tmp_path / "store"))


@pytest.fixture
def file(store: Slow, tmp_path: Path) -> ManifestFile:
    source = tmp_path / "weights.bin"
    source.write_bytes(b"w" * 100_000)
    digest = hash_file(source)
    return ManifestFile("weights.bin", digest.size, digest.sha256, Blobs(store).put(source, digest))


def names(cache: NodeCache, file: ManifestFile) -> set[str]:
    return {path.name for path in cache.blob_path(file.sha256).parent.iterdir()}


def test_eight_at_once_read_it_once(store: Slow, file: ManifestFile, tmp_path: Path):
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: NodeCache(tmp_path / "node").fetch(store, file), range(8)))
    assert store.downloads == 1
    assert len(set(paths)) == 1
    assert hash_file(paths[0]) == file.digest
    assert names(NodeCache(tmp_path / "node"), file) == {file.sha256, f"{file.sha256}.verified"}


def claim_of(cache: NodeCache, file: ManifestFile, owner: dict) -> Path:
    path = cache.blob_path(file.sha256)
    path.parent.mkdir(parents=True)
    claim = path.with_name(f"{path.name}.claim")
    claim.write_text(json.dumps(owner))
    return claim


def test_a_killed_holder_is_not_waited_for(store: Slow, file: ManifestFile, tmp_path: Path):
    # Far longer than a test may take.
    cache = NodeCache(tmp_path / "node", stall_seconds=1000)
    code = f"import json; from pathlib import Path; from metaflow_hf.store import work_dirs as w; print(json.dumps(w.owner_here(Path({str(tmp_path)!r}))))"
    gone = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    claim = claim_of(cache, file, json.loads(gone))
    assert hash_file(cache.fetch(store, file)) == file.digest
    assert not claim.exists()


def test_a_holder_that_stalls_is_not_waited_for_long(store: Slow, file: ManifestFile, tmp_path: Path):
    cache = NodeCache(tmp_path / "node", stall_seconds=0.3)
    claim_of(cache, file, work_dirs.owner_here(tmp_path))
    began = time.monotonic()
    assert hash_file(cache.fetch(store, file)) == file.digest
    assert time.monotonic() - began > 0.3


def test_a_holder_whose_file_grows_is_waited_for(store: Slow, file: ManifestFile, tmp_path: Path):
    # Longer than a thread is ever kept waiting on a busy machine, shorter than all pauses together.
    cache = NodeCache(tmp_path / "node", stall_seconds=4)
    claim = claim_of(cache, file, work_dirs.owner_here(tmp_path))
    part = claim.with_name(f".{file.sha256}.x.part")

    def grow() -> None:
        for size in range(9):
            part.write_bytes(b"w" * (size + 1))
            time.sleep(0.5)
        part.write_bytes(b"w" * file.size)
        cache.adopt(part, file.digest)
        claim.unlink()

    thread = threading.Thread(target=grow)
    thread.start()
    cache.fetch(store, file)
    thread.join()
    assert store.downloads == 0


def test_a_failed_holder_leaves_it_to_the_others(store: Slow, file: ManifestFile, tmp_path: Path):
    store.put(file.blob, b"x" * file.size)

    def fetch(_: int) -> str:
        with pytest.raises(IntegrityError):
            NodeCache(tmp_path / "node").fetch(store, file)
        return "failed"

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(fetch, range(3))) == ["failed"] * 3
    assert names(NodeCache(tmp_path / "node"), file) == set()
