"""A file given to the store: renamed where that is possible, copied elsewhere, gone from its place either way."""

import hashlib

import pytest

from metaflow_hf.errors import StoreUnavailable
from metaflow_hf.store import Digest, open_store

DATA = b"block" * 1000
DIGEST = Digest(hashlib.sha256(DATA).hexdigest(), len(DATA))


@pytest.mark.parametrize("location", ["memory://take", "directory"])
def test_the_file_becomes_the_object(location, tmp_path):
    store = open_store(location if "://" in location else tmp_path / location)
    path = tmp_path / "file"
    path.write_bytes(DATA)
    store.child("below").take(path, "a/b", DIGEST)
    assert store.get("below/a/b") == DATA
    assert not path.exists()


def test_in_a_directory_nothing_is_copied(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(DATA)
    inode = path.stat().st_ino
    open_store(tmp_path / "store").take(path, "a", DIGEST)
    assert (tmp_path / "store/a").stat().st_ino == inode


def test_a_file_of_another_file_system_is_copied(tmp_path, monkeypatch):
    import errno
    from pathlib import Path

    def refuse(self, target):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    path = tmp_path / "file"
    path.write_bytes(DATA)
    store = open_store(tmp_path / "store")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refuse)
        store.take(path, "a", DIGEST)
    assert store.get("a") == DATA
    assert not path.exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store/a").write_text("a file where a directory is wanted")
    path = tmp_path / "file"
    path.write_bytes(DATA)
    with pytest.raises(StoreUnavailable, match="a/b"):
        open_store(tmp_path / "store").take(path, "a/b", DIGEST)
    assert path.exists()
