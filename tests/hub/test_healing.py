"""Damaged, lost and swapped bytes are noticed when they are loaded, and healed where the hub has them."""

from pathlib import Path

import pytest

from metaflow_hf.errors import IntegrityError, NotFound
from metaflow_hf.store.models import find_manifest, load_directory
from metaflow_hf.store.node_cache import NodeCache


@pytest.fixture
def reference(own_hub, snapshots, request_for):
    return snapshots().ensure(request_for())


@pytest.fixture
def manifest(store, reference):
    return find_manifest(store, reference)[1]


def flip_bit(store, manifest) -> None:
    data = bytearray(store.get(manifest.files[2].blob))
    data[1000] ^= 1
    store.put(manifest.files[2].blob, bytes(data))


def truncate(store, manifest) -> None:
    store.put(manifest.files[2].blob, store.get(manifest.files[2].blob)[:-1])


def delete(store, manifest) -> None:
    store.delete(manifest.files[2].blob)


def swap(store, manifest) -> None:
    one, other = manifest.files[2], manifest.files[3]
    first, second = store.get(one.blob), store.get(other.blob)
    store.put(one.blob, second)
    store.put(other.blob, first)


@pytest.mark.parametrize("damage", [flip_bit, truncate, delete, swap])
def test_damaged_blobs_are_downloaded_again_and_healed(
    own_hub, snapshots, store, reference, manifest, read_tree, files, damage, tmp_path: Path
):
    damage(store, manifest)
    fresh_node = NodeCache(tmp_path / "fresh")
    with own_hub.log.new() as log:
        loaded = snapshots(cache=fresh_node).load(reference, tmp_path / "out")
    assert read_tree(loaded) == files
    damaged = 2 if damage is swap else 1
    assert log.file_bytes() == damaged * 300_000
    # Healed for everyone: another node needs no hub.
    own_hub.close()
    assert (
        read_tree(load_directory(store, reference, tmp_path / "b", cache=NodeCache(tmp_path / "c"))) == files
    )


@pytest.mark.parametrize(("damage", "error"), [(flip_bit, IntegrityError), (delete, NotFound)])
def test_offline_damage_is_a_clear_error_and_nothing_wrong_is_given(
    snapshots, store, reference, manifest, damage, error, monkeypatch, tmp_path: Path
):
    damage(store, manifest)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(error, match="cannot be loaded"):
        snapshots(cache=NodeCache(tmp_path / "fresh")).load(reference, tmp_path / "out")
    assert not (tmp_path / "out" / manifest.files[2].path).exists()


def test_what_a_collection_deleted_is_healed_under_the_next_generation(
    own_hub, snapshots, store, reference, manifest, read_tree, files, tmp_path: Path
):
    blob = manifest.files[2].blob
    store.create(f"gc/condemned/{blob}", b"{}")
    store.delete(blob)
    loaded = snapshots(cache=NodeCache(tmp_path / "fresh")).load(reference, tmp_path / "out")
    assert read_tree(loaded) == files
    assert [info.key for info in store.list("blobs") if info.key.startswith(blob)] == [f"{blob}.1"]
    own_hub.close()
    assert (
        read_tree(load_directory(store, reference, tmp_path / "b", cache=NodeCache(tmp_path / "c"))) == files
    )


def test_small_files_are_healed_too(
    own_hub, snapshots, store, reference, manifest, read_tree, files, tmp_path: Path
):
    small = next(file for file in manifest.files if file.path == "config.json")
    store.put(small.blob, b"x" * small.size)
    loaded = snapshots(cache=NodeCache(tmp_path / "fresh")).load(reference, tmp_path / "out")
    assert read_tree(loaded) == files


def test_a_damaged_manifest_is_a_clear_error(snapshots, store, reference, tmp_path: Path):
    key, _ = find_manifest(store, reference)
    store.put(key, store.get(key).replace(b"config", b"CONFIG"))
    with pytest.raises(IntegrityError, match="damaged"):
        snapshots().load(reference, tmp_path / "out")
