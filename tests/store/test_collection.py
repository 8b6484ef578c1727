"""Collecting what nothing names: two passes, and writers at every moment between them."""

import signal
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from metaflow_hf.errors import IntegrityError, SelectionError
from metaflow_hf.store import open_store
from metaflow_hf.store.blobs import Blobs, hash_file
from metaflow_hf.store.checkpoints import CheckpointTask, save_checkpoint
from metaflow_hf.store.collection import collect, unreferenced
from metaflow_hf.store.inspection import usage
from metaflow_hf.store.manifests import Manifest, ManifestFile, publish
from metaflow_hf.store.models import delete_reference, find_manifest, load_directory, save_directory
from metaflow_hf.store.node_cache import NodeCache

WHO = {"flow": "FlowX", "run": "12", "step": "train", "task": "7"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "a.bin").write_bytes(b"a" * 1000)
    (directory / "b.bin").write_bytes(b"b" * 2000)
    return directory


def after(days: float):
    return lambda: datetime.now(UTC) + timedelta(days=days)


def keys(store, prefix: str) -> list[str]:
    return [info.key for info in store.list(prefix)]


def loaded(store, reference, place: Path) -> dict[str, bytes]:
    directory = load_directory(store, reference, place / "out", cache=NodeCache(place / "node"))
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def both_passes(store) -> None:
    collect(store, now=after(2))
    collect(store, now=after(10))


def test_unreferenced_bytes_go_in_the_second_pass_a_week_later(store, model: Path):
    kept = save_directory(store, model / "a.bin", **WHO)
    gone = save_directory(store, model, **WHO, label="other")
    save_checkpoint(store, model / "a.bin", CheckpointTask(flow="F", run="1", step="s", task="2"))
    assert collect(store, now=after(2)).condemned == {}
    delete_reference(store, gone)
    assert sum(unreferenced(store).values()) == 2000
    first = collect(store, now=after(2))
    assert list(first.condemned.values()) == [2000]
    assert collect(store, now=after(6)).waiting == first.condemned
    assert collect(store, keep_days=30, now=after(20)).deleted == {}
    before = keys(store, "")
    rehearsed = collect(store, now=after(10), dry_run=True)
    assert keys(store, "") == before
    done = collect(store, now=after(10))
    assert rehearsed.deleted == done.deleted == first.condemned
    assert len(keys(store, "blobs")) == 1
    assert done.to_json()["deleted"] == {"blobs": 1, "bytes": 2000}
    delete_reference(store, kept)
    assert collect(store, now=after(20)).condemned == {}  # the checkpoint names it


def test_what_a_killed_upload_left_goes_but_not_while_it_may_run(store, model: Path):
    Blobs(store).put(model / "a.bin", hash_file(model / "a.bin"))
    assert collect(store).condemned == {}
    assert len(collect(store, now=after(2)).condemned) == 1
    assert len(collect(store, now=after(10)).deleted) == 1


KILLED_IN_THE_MIDDLE = """
import os, signal, sys
from pathlib import Path
from metaflow_hf.store import open_store
from metaflow_hf.store.blobs import Blobs, hash_file
os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
Blobs(open_store(sys.argv[1])).put(Path(sys.argv[2]), hash_file(Path(sys.argv[2])))
"""


def test_the_file_of_a_writer_killed_in_the_middle_goes_a_day_later(model: Path, tmp_path: Path):
    place = tmp_path / "store"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_IN_THE_MIDDLE, str(place), str(model / "a.bin")], check=False
    )
    assert killed.returncode == -signal.SIGKILL
    store = open_store(place)
    kept = save_directory(store, model / "b.bin", **WHO)
    # As obstore names them.
    (place / "models" / "x.json#1").write_bytes(b"{")
    [left] = place.glob("blobs/*/*#*")
    assert keys(store, "blobs") == [find_manifest(store, kept)[1].files[0].blob]
    assert collect(store, now=after(0.9)).unfinished == {}
    rehearsed = collect(store, now=after(1.1), dry_run=True)
    assert left.exists()
    done = collect(store, now=after(1.1))
    assert done.unfinished == rehearsed.unfinished == {str(left): 1000, str(place / "models/x.json#1"): 1}
    assert done.to_json()["unfinished"] == {"blobs": 2, "bytes": 1001}
    assert not list(place.rglob("*#*"))
    assert loaded(store, kept, tmp_path) == {"b.bin": b"b" * 2000}


def test_what_a_killed_download_noted_goes_a_week_later(store):
    store.put("arrivals/hub/models--acme--model/0123.json", b"{}")
    collect(store, now=after(6))
    collect(store, now=after(8), dry_run=True)
    assert len(keys(store, "arrivals")) == 1
    collect(store, now=after(8))
    assert keys(store, "arrivals") == []


def test_fewer_than_seven_days_are_refused(store):
    with pytest.raises(SelectionError, match="7 days"):
        collect(store, keep_days=6)


def test_datasets_and_what_is_remembered_of_their_sources_stay_and_are_counted(store):
    for name in ("datasets/d/blocks/block_00000.jsonl", "sources/hub/acme--rows/refs.json"):
        store.put(name, b"12345")
    for days in (2, 30, 60):
        collect(store, now=after(days))
    counted = {item.name: (item.objects, item.size) for item in usage(store)}
    assert (counted["datasets"], counted["sources"]) == ((1, 5), (1, 5))


def test_a_damaged_manifest_stops_it_before_anything_is_lost(store, model: Path):
    reference = save_directory(store, model, **WHO)
    store.put(reference.key, b"{}")
    with pytest.raises(IntegrityError, match=r"models/.* is damaged"):
        collect(store, now=after(2))
    assert keys(store, "gc/condemned") == []


def test_bytes_that_were_deleted_are_stored_under_the_next_generation(store, model: Path, tmp_path: Path):
    for generation in range(3):
        reference = save_directory(store, model, **WHO)
        assert loaded(store, reference, tmp_path / str(generation))["b.bin"] == b"b" * 2000
        suffix = f".{generation}" if generation else ""
        assert all(key.endswith(suffix) for key in keys(store, "blobs"))
        delete_reference(store, reference)
        both_passes(store)
        assert keys(store, "blobs") == []


def test_a_blob_in_use_again_is_spared(store, model: Path, tmp_path: Path):
    blobs = Blobs(store)
    files = [
        ManifestFile(path.name, digest.size, digest.sha256, blobs.put(path, digest))
        for path in model.iterdir()
        for digest in [hash_file(path)]
    ]
    collect(store, now=after(2))
    # A writer that had looked before, and was killed before it could look again.
    publish(store, "models/a/b/c/d/e.json", Manifest(tuple(files), {}))
    assert len(collect(store, now=after(10)).spared) == 2
    assert len(loaded(store, "models/a/b/c/d/e.json", tmp_path)) == 2
    # Nobody else begins to rely on them, so that they can go when this manifest has gone.
    reference = save_directory(store, model, **WHO)
    delete_reference(store, "models/a/b/c/d/e.json")
    assert len(collect(store, now=after(10)).deleted) == 2
    assert len(loaded(store, reference, tmp_path / "next")) == 2


class Interrupted:
    """A store that lets something happen just before its n-th operation."""

    def __init__(self, inner: Any, at: int, action) -> None:
        self._inner, self._at, self._action = inner, at, action
        self._lock = threading.Lock()
        self.operations = 0

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._inner, name)
        if not callable(attribute):
            return attribute

        def call(*arguments, **keywords):
            with self._lock:
                if self.operations == self._at:
                    self._action()
                self.operations += 1
            return attribute(*arguments, **keywords)

        return call


@pytest.mark.parametrize("left_behind", ["orphans", "manifest deleted", "condemned"])
def test_a_writer_is_safe_from_collections_at_every_moment(model: Path, tmp_path: Path, left_behind: str):
    at = operations = 0
    while at <= operations:
        store = open_store(f"memory://race-{tmp_path.name}-{left_behind}-{at}")
        # The bytes are there already, and nothing names them.
        delete_reference(store, save_directory(store, model, **WHO, label="old"))
        if left_behind == "orphans":
            store.delete(keys(store, "blobs")[0])
        if left_behind == "condemned":
            collect(store, now=after(2))
        racing = Interrupted(store, at, lambda store=store: both_passes(store))
        reference = save_directory(racing, model, **WHO)
        both_passes(store)
        place = tmp_path / left_behind / str(at)
        assert loaded(store, reference, place) == {"a.bin": b"a" * 1000, "b.bin": b"b" * 2000}, at
        operations, at = racing.operations, at + 1
    assert operations >= 5


@pytest.mark.parametrize("days", [2, 10], ids=["condemns", "deletes"])
def test_a_collection_is_safe_from_writers_at_every_moment(model: Path, tmp_path: Path, days: int):
    """The other way round: a whole writer between two operations of a pass, reusing what nothing named before."""
    at = operations = 0
    while at <= operations:
        store = open_store(f"memory://pass-{tmp_path.name}-{at}")
        delete_reference(store, save_directory(store, model, **WHO, label="old"))
        if days == 10:
            collect(store, now=after(2))
        saved = []
        racing = Interrupted(
            store, at, lambda store=store, saved=saved: saved.append(save_directory(store, model, **WHO))
        )
        collect(racing, now=after(days))
        both_passes(store)
        for number, reference in enumerate(saved):
            place = tmp_path / f"{at}-{number}"
            assert loaded(store, reference, place) == {"a.bin": b"a" * 1000, "b.bin": b"b" * 2000}, at
        operations, at = racing.operations, at + 1
    assert operations >= 5


class Hooked:
    """A store some of whose methods are another's."""

    def __init__(self, inner: Any, **methods) -> None:
        self._inner = inner
        self.__dict__.update(methods)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def test_a_manifest_that_appears_between_two_collections_of_one_condemned_blob(model: Path, tmp_path: Path):
    """The writer looked before the first pass; of two later ones, one missed its manifest and deletes last."""
    store = open_store(f"memory://slow-{tmp_path.name}")
    delete_reference(store, save_directory(store, model, **WHO, label="old"))
    decided: list[str] = []

    def create(key: str, data: bytes):
        if not key.startswith("models/") or decided:
            return store.create(key, data)
        collect(store, now=after(2))
        collect(Hooked(store, delete=decided.append), now=after(10))
        created = store.create(key, data)
        assert len(collect(store, now=after(10)).spared) == 2
        return created

    reference = save_directory(Hooked(store, create=create), model, **WHO)
    assert len(decided) == 2
    for blob in decided:
        store.delete(blob)
    assert loaded(store, reference, tmp_path) == {"a.bin": b"a" * 1000, "b.bin": b"b" * 2000}


def test_a_healed_generation_is_found_and_kept(store, model: Path, tmp_path: Path):
    reference = save_directory(store, model / "a.bin", **WHO)
    [blob] = keys(store, "blobs")
    store.create(f"gc/condemned/{blob}", b"{}")
    store.delete(blob)
    digest = hash_file(model / "a.bin")
    assert Blobs(store).heal(model / "a.bin", blob, digest) == f"{blob}.1"
    both_passes(store)
    assert loaded(store, reference, tmp_path) == {"a.bin": b"a" * 1000}
    # A key that is not condemned is healed in place.
    store.put(f"{blob}.1", b"damaged")
    assert Blobs(store).heal(model / "a.bin", f"{blob}.1", digest) == f"{blob}.1"
    assert loaded(store, reference, tmp_path / "again") == {"a.bin": b"a" * 1000}
