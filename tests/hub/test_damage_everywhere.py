"""Damaged bytes of a snapshot are healed by whatever door it is loaded, from a disk and from S3."""

from pathlib import Path

import pytest

from metaflow_hf import hub
from metaflow_hf.hub.records import RunContext
from metaflow_hf.hub.task_models import TaskModels
from metaflow_hf.hub.task_snapshots import TaskSnapshots
from metaflow_hf.store import configured_store, datastore
from metaflow_hf.store.manifests import ManifestFile
from metaflow_hf.store.models import find_manifest
from metaflow_hf.store.objects import ObjectStore

RUN = RunContext("FlowX", "1", "start", "7", "user:tester")


def flip(store: ObjectStore, one: ManifestFile, _: ManifestFile) -> None:
    data = bytearray(store.get(one.blob))
    data[1000] ^= 1
    store.put(one.blob, bytes(data))


def truncate(store: ObjectStore, one: ManifestFile, _: ManifestFile) -> None:
    store.put(one.blob, store.get(one.blob)[:-1])


def delete(store: ObjectStore, one: ManifestFile, _: ManifestFile) -> None:
    store.delete(one.blob)


def swap(store: ObjectStore, one: ManifestFile, other: ManifestFile) -> None:
    first, second = store.get(one.blob), store.get(other.blob)
    store.put(one.blob, second)
    store.put(other.blob, first)


def by_load_model(reference: dict, place: Path) -> str:
    import metaflow

    return metaflow.load_model(reference, str(place))


def by_key(reference: dict, place: Path) -> str:
    import metaflow

    return metaflow.load_model(reference["key"], str(place))


def by_the_model_decorator(reference: dict, place: Path) -> str:
    return TaskModels(configured_store(), run=RUN, say=lambda _: None).load(reference, str(place))


def by_the_hub_decorator(reference: dict, place: Path) -> str:
    task = TaskSnapshots(configured_store(), run=RUN, say=lambda _: None)
    with task.load(reference["repo_id"], str(place)) as path:
        return path


def by_a_script(reference: dict, place: Path) -> str:
    return hub.snapshot_download(reference["repo_id"], local_dir=str(place))


def by_a_script_into_the_cache(reference: dict, place: Path) -> str:
    return hub.snapshot_download(reference["repo_id"])


DOORS = [
    by_load_model,
    by_the_hub_decorator,
    by_a_script,
    by_key,
    by_the_model_decorator,
    by_a_script_into_the_cache,
]


@pytest.fixture
def datastore_root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch) -> None:
    root = ("s3", request.getfixturevalue("s3_root")) if request.param == "s3" else ("local", str(tmp_path))
    monkeypatch.setattr(datastore, "_active", root)
    monkeypatch.setenv("METAFLOW_HF_CACHE", str(tmp_path / "first-node"))


@pytest.mark.parametrize(
    ("datastore_root", "load"),
    [*(("local", load) for load in DOORS), *(("s3", load) for load in DOORS[:3])],
    indirect=["datastore_root"],
)
@pytest.mark.usefixtures("datastore_root")
def test_each_damage_is_healed_by_each_door(own_hub, read_tree, files, tmp_path: Path, monkeypatch, load):
    store = configured_store()
    reference = TaskSnapshots(store, run=RUN, say=lambda _: None).snapshot_download("acme/model")
    shards = [file for file in find_manifest(store, reference)[1].files if "safetensors" in file.path]
    for number, damage in enumerate((flip, truncate, delete, swap)):
        damage(store, *shards[:2])
        # Another machine, which has nothing yet; then one more, which needs no hub.
        monkeypatch.setenv("METAFLOW_HF_CACHE", str(tmp_path / f"node-{number}"))
        with own_hub.log.new() as log:
            assert read_tree(Path(load(reference, tmp_path / f"out-{number}"))) == files
        assert log.file_bytes() == (2 if damage is swap else 1) * shards[0].size
        monkeypatch.setenv("METAFLOW_HF_CACHE", str(tmp_path / f"next-{number}"))
        with own_hub.log.new() as log:
            assert read_tree(Path(load(reference, tmp_path / f"again-{number}"))) == files
        assert log.file_bytes() == 0
