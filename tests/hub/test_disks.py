"""Disks that are full or may not be written, under the node's cache and under the datastore."""

import subprocess
from pathlib import Path

import pytest

from metaflow_hf.errors import StoreUnavailable
from metaflow_hf.store import open_store
from metaflow_hf.store.models import load_directory
from metaflow_hf.store.node_cache import NodeCache


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
