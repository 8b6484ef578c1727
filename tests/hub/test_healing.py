"""Damaged, lost and swapped bytes are noticed when they are loaded, and healed where the hub has them."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from metaflow_hf.errors import ContentLost, IntegrityError, SelectionError, StoreUnavailable
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


def test_tasks_that_heal_the_same_blob_at_once_keep_apart(
    own_hub, snapshots, store, reference, manifest, read_tree, files, tmp_path: Path
):
    delete(store, manifest)
    node = NodeCache(tmp_path / "fresh")
    with ThreadPoolExecutor(6) as tasks:
        places = [tmp_path / f"out{number}" for number in range(6)]
        loaded = list(tasks.map(lambda place: snapshots(cache=node).load(reference, place), places))
    assert all(read_tree(place) == files for place in loaded)


@pytest.mark.parametrize(("damage", "error"), [(flip_bit, IntegrityError), (delete, ContentLost)])
def test_offline_damage_is_a_clear_error_and_nothing_wrong_is_given(
    snapshots, store, reference, manifest, damage, error, monkeypatch, tmp_path: Path
):
    damage(store, manifest)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(error, match=rf"cannot be loaded.*{manifest.files[2].path}.*HF_HUB_OFFLINE unset"):
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


def test_an_old_reference_leads_to_what_was_cached_anew_under_the_next_generation(
    snapshots, store, reference, manifest, request_for, read_tree, files, tmp_path: Path
):
    key, _ = find_manifest(store, reference)
    store.delete(key)
    for file in manifest.files:
        # As a collection does with what nothing refers to.
        store.create(f"gc/condemned/{file.blob}", b"{}")
    again = snapshots().ensure(request_for())
    assert again.digest != reference.digest
    assert read_tree(snapshots().load(reference, tmp_path / "out")) == files


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


def test_a_damaged_manifest_is_gone_once_it_is_deleted(snapshots, store, reference, request_for):
    key, _ = find_manifest(store, reference)
    store.put(key, store.get(key)[:-20])
    with pytest.raises(IntegrityError, match="Delete this object"):
        snapshots().ensure(request_for())
    store.delete(key)
    assert snapshots().ensure(request_for()).digest == reference.digest


@pytest.mark.parametrize("is_gone", [True, False])
def test_an_earlier_manifest_that_is_of_no_use_is_in_nobodys_way(
    own_hub, snapshots, store, request_for, files, monkeypatch, is_gone
):
    key, _ = find_manifest(store, snapshots().ensure(request_for(allow_patterns="config.json")))
    data, listed = store.get(key)[:-20], type(store).list
    store.put(key, data)

    def list_then_delete(self, prefix="", **options):
        infos = list(listed(self, prefix, **options))
        if is_gone and prefix.startswith("manifests/"):
            self.delete(key)
        return iter(infos)

    monkeypatch.setattr(type(store), "list", list_then_delete)
    assert snapshots().ensure(request_for()).num_files == len(files)


def test_another_hub_is_named_and_not_asked(
    snapshots, store, reference, manifest, monkeypatch, tmp_path: Path
):
    flip_bit(store, manifest)
    origin = find_manifest(store, reference)[0].split("/")[1]
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(IntegrityError, match=f"It came from {origin}: set HF_ENDPOINT"):
        snapshots(cache=NodeCache(tmp_path / "fresh")).load(reference, tmp_path / "out")


@pytest.mark.parametrize("verify", ["always", "once", "never"])
@pytest.mark.parametrize("damage", [flip_bit, truncate, delete, swap])
def test_each_way_to_verify_notices_what_it_promises(
    own_hub, snapshots, store, reference, manifest, read_tree, files, damage, verify, tmp_path: Path
):
    damage(store, manifest)
    loaded = snapshots(cache=NodeCache(tmp_path / "fresh")).load(reference, tmp_path / "out", verify=verify)
    # Who never verifies still gets no file of another size.
    assert (read_tree(loaded) == files) == (verify != "never" or damage in (truncate, delete))
    assert {path: len(data) for path, data in read_tree(loaded).items()} == {
        path: len(data) for path, data in files.items()
    }


def test_a_node_cache_that_root_changed_is_noticed(
    own_hub, snapshots, store, reference, manifest, read_tree, files, tmp_path: Path
):
    node = NodeCache(tmp_path / "one-node")
    snapshots(cache=node).load(reference, tmp_path / "before")
    blob = node.blob_path(manifest.files[2].sha256)
    data = bytearray(blob.read_bytes())
    data[7] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(data)
    with own_hub.log.new() as log:
        assert read_tree(snapshots(cache=node).load(reference, tmp_path / "after")) == files
    assert len(log) == 0


@pytest.mark.parametrize("where", ["folder", "target", "dangling", "circle"])
def test_links_planted_in_a_path_of_the_user_lead_nowhere(
    snapshots, reference, read_tree, files, tmp_path: Path, where: str
):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "vocab.txt").write_text("theirs")
    target = tmp_path / "out"
    if where == "target":
        # The user's own choice: a large disk elsewhere.
        target.symlink_to(outside)
        assert read_tree(snapshots().load(reference, target)) == files | {"vocab.txt": b"theirs"}
        return
    target.mkdir()
    if where == "circle":
        (target / "tokenizer").symlink_to(target / "tokenizer")
        with pytest.raises(StoreUnavailable, match=r"cannot be written to .*out"):
            snapshots().load(reference, target)
        return
    (target / "tokenizer").symlink_to(outside if where == "folder" else tmp_path / "nowhere")
    with pytest.raises(SelectionError, match=r"tokenizer.* link to .*(outside|nowhere)"):
        snapshots().load(reference, target)
    assert read_tree(outside) == {"vocab.txt": b"theirs"}
    assert not (tmp_path / "nowhere").exists()


def test_a_link_where_a_file_belongs_is_replaced_not_followed(snapshots, reference, files, tmp_path: Path):
    target, victim = tmp_path / "out", tmp_path / "victim"
    target.mkdir()
    victim.write_text("theirs")
    (target / "config.json").symlink_to(victim)
    snapshots().load(reference, target)
    assert victim.read_text() == "theirs"
    assert not (target / "config.json").is_symlink()
    assert (target / "config.json").read_bytes() == files["config.json"]
