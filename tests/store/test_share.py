"""Files that nobody changes any more: a second name instead of a copy, where the file system can; verified all the same."""

import errno
import hashlib
import os
from pathlib import Path

import pytest

from metaflow_hf.errors import IntegrityError, NotFound, StoreUnavailable
from metaflow_hf.store import Digest, ObjectStore, open_store

DATA = b"tensor" * 1000
DIGEST = Digest(hashlib.sha256(DATA).hexdigest(), len(DATA))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    return path


def test_the_file_is_the_object_and_stays(store: ObjectStore, path: Path, tmp_path: Path):
    for _ in range(2):
        store.child("below").share(path, "a/b", DIGEST)
    assert store.get("below/a/b") == path.read_bytes() == DATA
    assert store.child("below").download("a/b", tmp_path / "loaded", expected=DIGEST, shared=True) == DIGEST
    assert (tmp_path / "loaded").read_bytes() == DATA
    assert list(store.unfinished()) == []


def test_in_a_directory_nothing_is_copied(path: Path, tmp_path: Path):
    store = open_store(tmp_path / "store")
    store.share(path, "a", DIGEST)
    store.download("a", tmp_path / "loaded", expected=DIGEST, shared=True)
    assert (tmp_path / "store/a").samefile(path)
    assert (tmp_path / "loaded").samefile(path)
    # Unless a caller did not promise to leave the file as it is.
    store.download("a", tmp_path / "own", expected=DIGEST)
    assert not (tmp_path / "own").samefile(path)


def test_an_object_is_replaced_and_who_has_the_old_one_keeps_it(path: Path, tmp_path: Path):
    store = open_store(tmp_path / "store")
    store.put("a", b"old")
    store.download("a", tmp_path / "loaded", shared=True)
    store.share(path, "a", DIGEST)
    assert store.get("a") == DATA
    assert (tmp_path / "loaded").read_bytes() == b"old"
    store.delete("a")
    assert path.read_bytes() == DATA


@pytest.mark.parametrize("answer", [errno.EXDEV, errno.EPERM, errno.EMLINK])
def test_where_there_are_no_links_files_are_copied(path: Path, tmp_path: Path, monkeypatch, answer: int):
    def refuse(source, target):
        raise OSError(answer, os.strerror(answer))

    monkeypatch.setattr(os, "link", refuse)
    store = open_store(tmp_path / "store")
    store.share(path, "a", DIGEST)
    store.download("a", tmp_path / "loaded", expected=DIGEST, shared=True)
    assert store.get("a") == (tmp_path / "loaded").read_bytes() == DATA
    assert not (tmp_path / "store/a").samefile(path)
    assert not (tmp_path / "loaded").samefile(tmp_path / "store/a")


def test_damaged_and_missing_objects_leave_nothing(store: ObjectStore, tmp_path: Path):
    store.put("a", DATA[:-1] + b"!")
    with pytest.raises(IntegrityError, match="a is damaged"):
        store.download("a", tmp_path / "loaded", expected=DIGEST, shared=True)
    with pytest.raises(NotFound):
        store.download("b", tmp_path / "loaded", expected=DIGEST, shared=True)
    assert [entry for entry in tmp_path.iterdir() if "loaded" in entry.name] == []


def test_a_place_that_cannot_be_written_is_named(path: Path, tmp_path: Path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store/a").write_text("a file where a directory is wanted")
    with pytest.raises(StoreUnavailable, match="a/b"):
        open_store(tmp_path / "store").share(path, "a/b", DIGEST)
