"""Models saved from directories and loaded back, on every kind of store."""

import json
import os
from pathlib import Path

import pytest

from metaflow_hf.errors import IntegrityError, NotFound, SelectionError
from metaflow_hf.references import ModelRef
from metaflow_hf.store import models as models_module
from metaflow_hf.store.blobs import hash_file
from metaflow_hf.store.models import delete_reference, find_manifest, load_directory, save_directory
from metaflow_hf.store.node_cache import NodeCache
from metaflow_hf.store.objects import ObjectStore

WHO = {"flow": "FlowX", "run": "12", "step": "train", "task": "7"}


@pytest.fixture
def cache(tmp_path: Path) -> NodeCache:
    return NodeCache(tmp_path / "node")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    (directory / "sub").mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "sub" / "weights.bin").write_bytes(b"w" * 10_000)
    return directory


def tree(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_a_model_comes_back_as_it_was(store: ObjectStore, cache: NodeCache, model: Path):
    reference = save_directory(store, model, **WHO, label="best", metadata={"loss": 1.5})
    assert tree(load_directory(store, reference, cache=cache)) == tree(model)
    assert reference.key.startswith("models/FlowX/12/train/7/best-")
    assert (reference.num_files, reference.size) == (2, 10_002)
    assert reference.pathspec == "FlowX/12/train/7"
    assert reference.metadata == {"loss": 1.5}


def test_a_model_loads_by_reference_dict_or_key(store: ObjectStore, cache: NodeCache, model: Path):
    reference = save_directory(store, model, **WHO)
    through_json = json.loads(json.dumps(reference.to_json()))
    for form in (reference, reference.to_json(), through_json, reference.key):
        assert tree(load_directory(store, form, cache=cache)) == tree(model)
    assert ModelRef.from_json(through_json) == reference


def test_saving_the_same_bytes_again_stores_nothing(store: ObjectStore, model: Path):
    first = save_directory(store, model, **WHO)
    before = [info.key for info in store.list()]
    assert save_directory(store, model, **WHO).key == first.key
    assert [info.key for info in store.list()] == before
    other = save_directory(store, model, **{**WHO, "task": "8"}, label="again")
    assert len([info.key for info in store.list("blobs")]) == 2
    assert other.key != first.key


def test_a_single_file_is_a_model_too(store: ObjectStore, cache: NodeCache, model: Path):
    reference = save_directory(store, model / "config.json", **WHO)
    assert tree(load_directory(store, reference, cache=cache)) == {"config.json": b"{}"}


def test_links_are_followed_and_droppings_left_out(
    store: ObjectStore, cache: NodeCache, model: Path, tmp_path: Path
):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "big.bin").write_bytes(b"big")
    (model / "link.bin").symlink_to(outside / "big.bin")
    (model / "linked").symlink_to(outside)
    (model / "loop").symlink_to(model)
    (model / ".cache" / "huggingface").mkdir(parents=True)
    (model / ".cache" / "huggingface" / "x.metadata").write_text("junk")
    reference = save_directory(store, model, **WHO)
    assert tree(load_directory(store, reference, cache=cache)) == {
        "config.json": b"{}",
        "sub/weights.bin": b"w" * 10_000,
        "link.bin": b"big",
        "linked/big.bin": b"big",
    }


def test_two_names_of_one_directory_are_both_saved(store: ObjectStore, cache: NodeCache, tmp_path: Path):
    output = tmp_path / "output"
    (output / "checkpoint-100" / "deep").mkdir(parents=True)
    (output / "checkpoint-100" / "deep" / "w.bin").write_bytes(b"w")
    (output / "checkpoint-100" / "up").symlink_to(output)
    for name in ("latest", "best"):
        (output / name).symlink_to("checkpoint-100")
    saved = tree(load_directory(store, save_directory(store, output, **WHO), cache=cache))
    assert saved == dict.fromkeys(
        (f"{name}/deep/w.bin" for name in ("checkpoint-100", "latest", "best")), b"w"
    )


def test_what_another_load_is_still_writing_is_not_saved(
    store: ObjectStore, cache: NodeCache, model: Path, tmp_path: Path, monkeypatch
):
    reference = save_directory(store, model, **WHO)
    target = tmp_path / "shared by branches"
    load_directory(store, reference, target, cache=cache)
    saved, rename = [], Path.replace

    def save_before(part: Path, place: Path) -> Path:
        if part.is_relative_to(target):
            assert part in target.rglob("*")
            saved.append(save_directory(store, target, **WHO))
        return rename(part, place)

    monkeypatch.setattr(Path, "replace", save_before)
    load_directory(store, reference, target, cache=cache)
    assert saved
    assert {found.digest for found in saved} == {reference.digest}


@pytest.mark.parametrize("is_removed", [True, False])
def test_what_is_written_while_it_is_saved_is_said(store: ObjectStore, model: Path, monkeypatch, is_removed):
    def hash_then_change(path: Path):
        digest = hash_file(path)
        path.unlink()
        if not is_removed:
            path.write_bytes(b"other")
        return digest

    monkeypatch.setattr(models_module, "hash_file", hash_then_change)
    with pytest.raises(IntegrityError, match="was changed or removed while it was being saved"):
        save_directory(store, model, **WHO)
    assert list(store.list("models")) == []


def test_what_cannot_be_saved_is_said(store: ObjectStore, model: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    for nothing in (tmp_path / "no-such", tmp_path / "empty"):
        with pytest.raises(SelectionError, match="nothing to save"):
            save_directory(store, nothing, **WHO)
    with pytest.raises(SelectionError, match="JSON"):
        save_directory(store, model, **WHO, metadata={"x": object()})
    (model / "broken").symlink_to(tmp_path / "no-such")
    with pytest.raises(SelectionError, match="broken"):
        save_directory(store, model, **WHO)
    assert list(store.list("models")) == []


def test_what_cannot_be_loaded_is_said(store: ObjectStore, cache: NodeCache, model: Path):
    with pytest.raises(NotFound, match="deleted, or was written to another datastore"):
        load_directory(store, "models/a/b/c/d/e.json", cache=cache)
    with pytest.raises(SelectionError, match="not a reference"):
        load_directory(store, {"key": "x"}, cache=cache)
    reference = save_directory(store, model, **WHO)
    _, manifest = find_manifest(store, reference)
    store.put(manifest.files[1].blob, b"v" * 10_000)
    with pytest.raises(IntegrityError):
        load_directory(store, reference, cache=cache)


@pytest.mark.parametrize("label", ["x" * 221, "ü" * 90])
def test_a_label_too_long_for_a_key_is_refused_before_anything_is_stored(
    store: ObjectStore, model: Path, label
):
    with pytest.raises(SelectionError, match="is too long"):
        save_directory(store, model, **WHO, label=label)
    assert list(store.list("")) == []
    assert save_directory(store, model, **WHO, label="x" * 220).label == "x" * 220


def test_odd_labels_and_names_make_readable_keys(store: ObjectStore, cache: NodeCache, model: Path):
    reference = save_directory(store, model, **WHO, label="épo/che 1 ..")
    assert reference.key.count("/") == 5
    assert tree(load_directory(store, reference.key, cache=cache)) == tree(model)


def test_into_a_path_of_the_user(
    store: ObjectStore, cache: NodeCache, model: Path, tmp_path: Path, monkeypatch
):
    reference = save_directory(store, model, **WHO)
    target = tmp_path / "target"
    (target / "sub").mkdir(parents=True)
    (target / "mine.txt").write_text("mine")
    (target / "config.json").write_text("older")
    monkeypatch.chdir(target)
    for _ in range(2):
        assert load_directory(store, reference, ".", cache=cache) == Path()
        assert tree(target) == {**tree(model), "mine.txt": b"mine"}
    for path in target.rglob("*"):
        assert not path.is_symlink()
        assert os.access(path, os.W_OK)
        assert path.is_dir() or path.stat().st_nlink == 1


def test_a_directory_where_a_file_belongs_is_not_removed(
    store: ObjectStore, cache: NodeCache, model: Path, tmp_path
):
    reference = save_directory(store, model, **WHO)
    (tmp_path / "target" / "config.json").mkdir(parents=True)
    with pytest.raises(SelectionError, match="is a directory"):
        load_directory(store, reference, tmp_path / "target", cache=cache)


def test_a_deleted_model_is_gone_and_its_bytes_wait_for_collection(
    store: ObjectStore, cache: NodeCache, model: Path
):
    reference = save_directory(store, model, **WHO)
    delete_reference(store, reference.to_json())
    with pytest.raises(NotFound):
        load_directory(store, reference, cache=cache)
    with pytest.raises(NotFound):
        delete_reference(store, reference.key)
    assert len(list(store.list("blobs"))) == 2
    for key in ("blobs/ab/cdef", "manifests/x.json"):
        with pytest.raises(SelectionError):
            delete_reference(store, key)
