"""Disks that are full or may not be written, under the node's cache and under the datastore."""

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest

from metaflow_hf.errors import StoreUnavailable
from metaflow_hf.store import open_store
from metaflow_hf.store.eviction import trim
from metaflow_hf.store.models import load_directory
from metaflow_hf.store.node_cache import NodeCache
from metaflow_hf.store.node_claims import bringing


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 900 kB: a shard of 300 kB fits, the whole model does not. Only root can mount it."""
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", str(mount)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system is not permitted here")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def test_a_full_node_says_so_before_it_downloads(own_hub, snapshots, request_for, store, small_disk: Path):
    with (
        own_hub.log.new() as log,
        pytest.raises(StoreUnavailable, match=r"bytes and .* free.*METAFLOW_HF_CACHE"),
    ):
        snapshots(cache=NodeCache(small_disk)).ensure(request_for())
    assert log.file_bytes() == 0
    assert list(store.list("manifests")) == []


def test_a_node_that_fills_up_in_the_middle_is_said(
    own_hub, snapshots, request_for, store, small_disk: Path, tmp_path: Path, read_tree, files
):
    reference = snapshots().ensure(request_for())
    target = small_disk / "out"
    with pytest.raises(StoreUnavailable, match=r"Make room|cannot be used"):
        snapshots().load(reference, target)
    # What is there is whole.
    for path in target.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == files[path.relative_to(target).as_posix()]


def test_a_full_datastore_is_said_and_shows_nothing_half(
    own_hub, snapshots, request_for, files, small_disk: Path
):
    full = open_store(small_disk / "store")
    with pytest.raises(StoreUnavailable, match="small/store"):
        snapshots(store=full).ensure(request_for())
    assert list(full.list("manifests")) == list(full.list("snapshots")) == []
    # With room, what was stored is not downloaded again.
    subprocess.run(["mount", "-o", "remount,size=9m", str(small_disk)], check=True)
    with own_hub.log.new() as log:
        assert snapshots(store=full).ensure(request_for()).num_files == 7
    assert log.file_bytes() < sum(map(len, files.values()))


def test_a_read_only_datastore_loads_and_does_not_store(
    own_hub, snapshots, request_for, files, read_tree, small_disk: Path, tmp_path: Path
):
    subprocess.run(["mount", "-o", "remount,size=9m", str(small_disk)], check=True)
    frozen = open_store(small_disk / "store")
    reference = snapshots(store=frozen).ensure(request_for())
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert (
        read_tree(load_directory(frozen, reference, tmp_path / "out", cache=NodeCache(tmp_path / "n")))
        == files
    )
    # The run has pinned its commit: nothing need be written.
    assert snapshots(store=frozen).ensure(request_for()).key == reference.key
    with pytest.raises(StoreUnavailable, match="small/store"):
        snapshots(store=frozen, run="2").ensure(request_for())


@pytest.fixture
def full_disk(small_disk: Path) -> Path:
    """A file system without room for another byte."""
    with (small_disk / "fill").open("wb", buffering=0) as out, contextlib.suppress(OSError):
        while True:
            out.write(bytes(4096))
    return small_disk


def test_a_full_node_cache_is_not_taken_for_a_full_target_or_store(
    own_hub, snapshots, request_for, small_disk: Path, tmp_path: Path
):
    reference = snapshots().ensure(request_for())
    subprocess.run(["mount", "-o", "remount,size=400k", str(small_disk)], check=True)
    node = NodeCache(small_disk / "node")
    with pytest.raises(StoreUnavailable, match=r"the node cache .*small/node .*No space.*METAFLOW_HF_CACHE"):
        snapshots(cache=node).load(reference, tmp_path / "out")
    # Nothing half is left that would keep the disk full.
    assert not list(small_disk.rglob("*.part"))
    subprocess.run(["mount", "-o", "remount,size=9m", str(small_disk)], check=True)
    snapshots(cache=node).load(reference, tmp_path / "out")


def test_work_directories_and_staging_say_which_disk_is_full(full_disk: Path, tmp_path: Path):
    node = NodeCache(full_disk)
    with pytest.raises(StoreUnavailable, match=r"the node cache .*small.*No space.*METAFLOW_HF_CACHE"):
        node.new_work_dir("model")
    assert list((full_disk / "work").iterdir()) == []
    subprocess.run(["mount", "-o", "remount,ro", str(full_disk)], check=True)
    with pytest.raises(StoreUnavailable, match=r"the node cache .*small.*Read-only.*METAFLOW_HF_CACHE"):
        node.staging("a/b/c").__enter__()
    with pytest.raises(StoreUnavailable, match=r"small/mine cannot be written: Read-only.*temp_dir_root"):
        NodeCache(tmp_path / "node").new_work_dir("model", root=full_disk / "mine")


def test_a_claim_that_cannot_be_written_keeps_nobody_waiting(full_disk: Path):
    with pytest.raises(OSError, match="No space"), bringing(full_disk / "blob", done=lambda: False):
        pass
    assert not (full_disk / "blob.claim").exists()


def test_a_full_disk_stops_no_task_that_is_done(full_disk: Path):
    node = NodeCache(full_disk)
    (full_disk / "trimmed").unlink(missing_ok=True)
    assert trim(node, max_bytes=0) == 0


def test_a_limit_on_file_sizes_is_a_full_disk(own_hub, snapshots, request_for, tmp_path: Path):
    """A quota: the process may write small files only."""
    script = """
import resource, signal, sys
from pathlib import Path
from metaflow_hf.hub.request import SnapshotRequest
from metaflow_hf.hub.snapshots import Snapshots
from metaflow_hf.store import open_store
from metaflow_hf.store.node_cache import NodeCache
from metaflow_hf.store.node_claims import bringing

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
Snapshots(open_store(sys.argv[1]), NodeCache(Path(sys.argv[2]))).ensure(SnapshotRequest.of("acme/model"))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "store"), str(tmp_path / "node")],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("metaflow_hf.errors.StoreUnavailable: ")
    assert "File too large. Make room there, or set METAFLOW_HF_CACHE" in last
    assert not list((tmp_path / "store").glob("manifests/**/*.json"))
    # Without the limit the work is finished.
    store = open_store(tmp_path / "store")
    assert snapshots(store=store, cache=NodeCache(tmp_path / "node")).ensure(request_for()).num_files == 7
