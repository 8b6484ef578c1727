"""Bytes on their way into a file: in order, hashed, in bounded memory, and never half of them under a name."""

import hashlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from metaflow_hf.errors import IntegrityError, NotFound, StoreUnavailable
from metaflow_hf.store import Digest, ObjectStore, open_store, streams


def content(size: int) -> bytes:
    return hashlib.shake_256(b"streams").digest(1 << 20) * (size >> 20) + b"x" * (size % (1 << 20))


def digest_of(data: bytes) -> Digest:
    return Digest(sha256=hashlib.sha256(data).hexdigest(), size=len(data))


def test_ranges_arrive_in_order_however_they_finish():
    data = content(3 * streams.RANGE_BYTES + 7)
    last_came = threading.Event()

    def read(start: int, stop: int) -> memoryview:
        if start == 0:
            # The first to be asked for is the last to come.
            assert last_came.wait(60)
        if stop == len(data):
            last_came.set()
        return memoryview(data[start:stop])

    assert b"".join(streams.read_ahead(read, len(data))) == data


def test_no_more_ranges_are_under_way_than_there_are_readers():
    asked: list[int] = []

    def read(start: int, stop: int) -> memoryview:
        asked.append(start)
        return memoryview(bytes(1))

    chunks = streams.read_ahead(read, 100 * streams.RANGE_BYTES)
    next(chunks)
    assert len(asked) <= streams.READERS
    chunks.close()


def test_objects_that_are_read_together_share_the_readers():
    asked: dict[str, list[int]] = {"a": [], "b": [], "c": [], "d": [], "e": []}

    def reading(name: str) -> Iterator[memoryview]:
        def read(start: int, stop: int) -> memoryview:
            asked[name].append(start)
            return memoryview(bytes(1))

        return streams.read_ahead(read, 100 * streams.RANGE_BYTES)

    first, *others = [reading(name) for name in asked]
    next(first)
    for other in others:
        next(other)
    assert len(asked["e"]) <= max(2, streams.READERS // 5)
    for _ in range(streams.READERS):
        next(first)
    assert len(asked["a"]) <= streams.READERS + 2
    for other in others:
        other.close()
    before, deadline = len(asked["a"]), time.monotonic() + 20
    next(first)
    while len(asked["a"]) < before + streams.READERS - 2:
        assert time.monotonic() < deadline, "who is left alone does not have all readers again"
        time.sleep(0.01)
    first.close()


def test_a_range_that_fails_ends_the_reading():
    def read(start: int, stop: int) -> memoryview:
        if start:
            raise StoreUnavailable("gone")
        return memoryview(bytes(stop - start))

    with pytest.raises(StoreUnavailable, match="gone"):
        list(streams.read_ahead(read, 50 * streams.RANGE_BYTES))


@pytest.mark.parametrize("size", [0, 1, streams.RANGE_BYTES + 1])
def test_an_object_of_unknown_size_comes_whole(store: ObjectStore, tmp_path: Path, size: int):
    data = content(size)
    store.put("blob", data)
    assert store.download("blob", tmp_path / "loaded") == digest_of(data)
    assert (tmp_path / "loaded").read_bytes() == data


@pytest.mark.parametrize("other", [0, 1, 2 * streams.RANGE_BYTES])
def test_an_object_of_another_length_is_damaged(store: ObjectStore, tmp_path: Path, other: int):
    data = content(streams.RANGE_BYTES + 1)
    store.put("blob", content(other))
    with pytest.raises(IntegrityError, match=f"found {other} bytes"):
        store.download("blob", tmp_path / "loaded", expected=digest_of(data))
    longer = data + b"!"
    store.put("blob", longer)
    with pytest.raises(IntegrityError, match=f"found {len(longer)} bytes"):
        store.download("blob", tmp_path / "loaded", expected=digest_of(data))
    assert list(tmp_path.glob("*loaded*")) == []


def test_a_missing_object_leaves_nothing(store: ObjectStore, tmp_path: Path):
    for size in (1, 2 * streams.RANGE_BYTES):
        with pytest.raises(NotFound):
            store.download("blob", tmp_path / "loaded", expected=Digest("0" * 64, size))
    assert list(tmp_path.glob("*loaded*")) == []


DYING = """
import os, sys
from pathlib import Path
from metaflow_hf.store import open_store

written = os.write

def die(descriptor, data):
    written(descriptor, data[:100])
    os._exit(9)

os.write = die
open_store(sys.argv[1]).upload(Path(sys.argv[2]), "blob")
"""


def test_an_upload_that_dies_leaves_nothing_under_a_name(tmp_path: Path):
    store, source = open_store(tmp_path / "store"), tmp_path / "source"
    store.put("blob", b"before")
    source.write_bytes(content(2 * streams.CHUNK_BYTES))
    done = subprocess.run([sys.executable, "-c", DYING, tmp_path / "store", source], check=False)
    assert done.returncode == 9
    assert [info.key for info in store.list()] == ["blob"]
    assert store.get("blob") == b"before"


def test_an_upload_that_ends_leaves_nothing_beside_the_object(tmp_path: Path):
    store, source = open_store(tmp_path / "store"), tmp_path / "source"
    source.write_bytes(b"bytes")
    store.upload(source, "right")
    with pytest.raises(IntegrityError):
        store.upload(source, "wrong", expected=digest_of(b"others"))
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["right"]
