"""The node's cache: shared, verified, and never the way by which one task changes what another gets."""

import os
import stat
from pathlib import Path

import pytest

from metaflow_hf.errors import IntegrityError, StoreUnavailable
from metaflow_hf.store import materialize as materialize_module
from metaflow_hf.store import open_store
from metaflow_hf.store.blobs import hash_file, put_blob
from metaflow_hf.store.inspection import node_usage
from metaflow_hf.store.manifests import Manifest, ManifestFile
from metaflow_hf.store.materialize import materialize
from metaflow_hf.store.node_cache import NodeCache
from metaflow_hf.store.objects import ObjectStore


class CountingStore:
    """A store that counts what is downloaded from it."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self.downloads = 0

    def download(self, *arguments, **options):
        self.downloads += 1
        return self._store.download(*arguments, **options)

    def __getattr__(self, name: str):
        return getattr(self._store, name)


@pytest.fixture
def disk(tmp_path: Path) -> CountingStore:
    return CountingStore(open_store(tmp_path / "store"))


@pytest.fixture
def cache(tmp_path: Path) -> NodeCache:
    return NodeCache(tmp_path / "node")


@pytest.fixture
def manifest(disk, tmp_path: Path, monkeypatch) -> Manifest:
    """A small and a large file; large begins at 100 bytes here."""
    monkeypatch.setattr(materialize_module, "LARGE_BYTES", 100)
    files = []
    for name, data in (("small.json", b"{}"), ("large.bin", b"x" * 5000)):
        path = tmp_path / name
        path.write_bytes(data)
        digest = hash_file(path)
        files.append(ManifestFile(name, digest.size, digest.sha256, put_blob(disk, path, digest)))
    return Manifest(files=tuple(files))


@pytest.fixture
def no_reflink(monkeypatch):
    monkeypatch.setattr(materialize_module, "_reflink", lambda *_: False)


def large(manifest: Manifest) -> ManifestFile:
    return manifest.files[0]


def test_each_blob_is_brought_to_the_node_once(disk, cache, manifest, tmp_path: Path):
    for number in range(3):
        materialize(disk, manifest, tmp_path / str(number), cache=cache)
    assert disk.downloads == 2
    materialize(disk, manifest, tmp_path / "other-process", cache=NodeCache(cache.root))
    assert disk.downloads == 2


def test_large_files_are_read_only_links_and_small_ones_copies(
    disk, cache, manifest, no_reflink, tmp_path: Path
):
    work = materialize(disk, manifest, tmp_path / "work", cache=cache, link_large=True)
    cached = cache.blob_path(large(manifest).sha256)
    assert (work / "large.bin").samefile(cached)
    assert stat.S_IMODE(cached.stat().st_mode) == 0o444
    assert (work / "small.json").stat().st_nlink == 1
    assert os.access(work / "small.json", os.W_OK)
    assert not any(path.is_symlink() for path in work.rglob("*"))


def test_nothing_is_linked_to_the_datastore(disk, cache, manifest, no_reflink, tmp_path: Path):
    materialize(disk, manifest, tmp_path / "work", cache=cache, link_large=True)
    assert all(path.stat().st_nlink == 1 for path in (tmp_path / "store").rglob("*") if path.is_file())


def test_what_a_task_edits_reaches_neither_the_store_nor_the_next_task(
    disk, cache, manifest, no_reflink, tmp_path: Path
):
    work = materialize(disk, manifest, tmp_path / "work", cache=cache, link_large=True)
    for name in ("large.bin", "small.json"):
        (work / name).chmod(0o644)
        with (work / name).open("r+b") as file:
            file.write(b"EDITED")
    (work / "small.json").unlink()
    after = materialize(disk, manifest, tmp_path / "next", cache=cache, link_large=True)
    assert (after / "large.bin").read_bytes() == b"x" * 5000
    assert (after / "small.json").read_bytes() == b"{}"
    assert disk.get(large(manifest).blob) == b"x" * 5000


def damage_but_keep_looks(path: Path) -> None:
    """Changes bytes and puts size and mtime back, as a failing disk would."""
    info = path.stat()
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.write(b"EDITED")
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))


def test_verify_decides_when_bytes_are_read(disk, cache, manifest, tmp_path: Path):
    file = large(manifest)
    path = cache.fetch(disk, file)
    damage_but_keep_looks(path)
    assert cache.fetch(disk, file, verify="once").read_bytes() != b"x" * 5000
    assert cache.fetch(disk, file, verify="always").read_bytes() == b"x" * 5000
    assert disk.downloads == 2


def test_a_boot_later_the_file_is_read_once_more(disk, cache, manifest, monkeypatch):
    path = cache.fetch(disk, large(manifest))
    damage_but_keep_looks(path)
    monkeypatch.setattr("metaflow_hf.store.work_dirs.boot_id", lambda: "another boot")
    assert cache.fetch(disk, large(manifest)).read_bytes() == b"x" * 5000


def test_a_damaged_blob_is_never_served(disk, cache, manifest, tmp_path: Path):
    disk.put(large(manifest).blob, b"y" * 5000)
    with pytest.raises(IntegrityError):
        cache.fetch(disk, large(manifest))
    assert not cache.blob_path(large(manifest).sha256).exists()
    disk.put(large(manifest).blob, b"y" * 4999)
    with pytest.raises(IntegrityError):
        cache.fetch(disk, large(manifest), verify="never")


def test_what_was_never_verified_is_verified_when_asked(disk, cache, manifest):
    disk.put(large(manifest).blob, b"y" * 5000)
    assert cache.fetch(disk, large(manifest), verify="never").read_bytes() == b"y" * 5000
    with pytest.raises(IntegrityError):
        cache.fetch(disk, large(manifest), verify="once")


def test_what_another_task_placed_unverified_is_not_recorded_as_verified(disk, cache, manifest, monkeypatch):
    file, replace, others = large(manifest), Path.replace, [disk]

    def replace_then_another(source: Path, target: Path) -> Path:
        placed = replace(source, target)
        if target == cache.blob_path(file.sha256) and others:
            store = others.pop()
            good = store.get(file.blob)
            store.put(file.blob, b"y" * 5000)
            cache._bring(store, file, target, "never")
            store.put(file.blob, good)
        return placed

    monkeypatch.setattr(Path, "replace", replace_then_another)
    cache.fetch(disk, file)
    assert cache.fetch(disk, file).read_bytes() == b"x" * 5000


def test_file_systems_that_cannot_link_get_copies(
    disk, cache, manifest, no_reflink, monkeypatch, tmp_path: Path
):
    import errno

    def refuse(*_):
        raise OSError(errno.EXDEV, "cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    work = materialize(disk, manifest, tmp_path / "work", cache=cache, link_large=True)
    assert (work / "large.bin").stat().st_nlink == 1


def test_usage_counts_each_file_once_while_others_come_and_go(disk, cache, manifest, no_reflink, monkeypatch):
    for number in range(2):
        materialize(disk, manifest, cache.root / f"tree{number}", cache=cache, link_large=True)
    gone = cache.new_work_dir("gone")
    scandir = os.scandir

    def scan(path):
        if os.fspath(path) == str(gone):
            gone.rmdir()
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    used = node_usage(cache)
    monkeypatch.undo()
    assert not gone.exists()
    files = {path.stat().st_ino: path.stat().st_size for path in cache.root.rglob("*") if path.is_file()}
    assert (used.objects, used.size) == (len(files), sum(files.values()))
    assert 5000 <= used.size < 10_000


def test_the_cache_is_private_and_refuses_others(tmp_path: Path, monkeypatch):
    cache = NodeCache(tmp_path / "private")
    assert stat.S_IMODE(cache.root.stat().st_mode) == 0o700
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(StoreUnavailable, match="belongs to another user"):
        NodeCache(tmp_path / "private")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnavailable, match="METAFLOW_HF_CACHE"):
        NodeCache(tmp_path / "file" / "below")
