"""Models and checkpoints whose stored bytes were damaged: no hub has them, so what is said must help."""

import random
from pathlib import Path

import pytest

from metaflow_hf.errors import IntegrityError, NotFound
from metaflow_hf.hub.loading import load_manifest
from metaflow_hf.store.checkpoints import CheckpointTask, save_checkpoint
from metaflow_hf.store.manifests import Manifest
from metaflow_hf.store.models import find_manifest, save_directory
from metaflow_hf.store.node_cache import NodeCache
from metaflow_hf.store.objects import ObjectStore

FILES = {
    "config.json": b"{}",
    "weights/a.bin": random.Random(1).randbytes(50_000),
    "weights/b.bin": random.Random(2).randbytes(50_000),
}


@pytest.fixture
def state(tmp_path: Path) -> Path:
    for name, data in FILES.items():
        place = tmp_path / "state" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
    return tmp_path / "state"


def tree(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def flip_bit(store: ObjectStore, manifest: Manifest) -> None:
    data = bytearray(store.get(manifest.files[2].blob))
    data[1000] ^= 1
    store.put(manifest.files[2].blob, bytes(data))


def truncate(store: ObjectStore, manifest: Manifest) -> None:
    store.put(manifest.files[2].blob, store.get(manifest.files[2].blob)[:-1])


def delete(store: ObjectStore, manifest: Manifest) -> None:
    store.delete(manifest.files[2].blob)


def swap(store: ObjectStore, manifest: Manifest) -> None:
    one, other = manifest.files[1].blob, manifest.files[2].blob
    first, second = store.get(one), store.get(other)
    store.put(one, second)
    store.put(other, first)


def save_model(store, state: Path):
    return save_directory(store, state, flow="F", run="1", step="s", task="2", label="final")


def save_checkpoint_of(store, state: Path):
    return save_checkpoint(store, state, CheckpointTask(flow="F", run="1", step="s", task="2"))


@pytest.mark.parametrize("save", [save_model, save_checkpoint_of])
@pytest.mark.parametrize("damage", [flip_bit, truncate, delete, swap])
def test_models_without_a_hub_say_which_file_of_which_key_and_what_to_do(
    store, state, save, damage, tmp_path: Path
):
    kept = save(store, state)
    key, manifest = find_manifest(store, kept)
    damage(store, manifest)

    def load(node: str) -> Path:
        return load_manifest(store, key, manifest, tmp_path / node, cache=NodeCache(tmp_path / f"{node}-c"))

    with pytest.raises(IntegrityError) as caught:
        load("first")
    assert isinstance(caught.value, NotFound) == (damage is delete)
    file = manifest.files[1 if damage is swap else 2]
    for words in (repr(file.path), kept.key, file.blob, "save the same files again"):
        assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "first" / file.path).exists()
    # What it says helps.
    save(store, state)
    assert tree(load("second")) == FILES
