"""Many processes want one snapshot: one downloads it, and it does not matter which one dies."""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from metaflow_hf.store import open_store
from metaflow_hf.store.models import load_directory
from metaflow_hf.store.node_cache import NodeCache

SHARD = "*model-00003-of-00004.safetensors"
ENSURE = """
import json, sys
from pathlib import Path
from metaflow_hf.hub.records import RunContext
from metaflow_hf.hub.request import SnapshotRequest
from metaflow_hf.hub.snapshots import Snapshots
from metaflow_hf.store import open_store
from metaflow_hf.store.node_cache import NodeCache

store, node, task, lease_seconds = sys.argv[1:]
run = RunContext("FlowX", "1", "train", task, "user:tester")
snapshots = Snapshots(open_store(store), NodeCache(Path(node)), run=run, lease_seconds=float(lease_seconds))
print(json.dumps(snapshots.ensure(SnapshotRequest.of("acme/model", max_workers=1)).to_json()))
"""


@pytest.fixture
def start(tmp_path: Path):
    """Starts a task of its own process; tasks are on one node unless `node` says otherwise."""
    tasks: list[subprocess.Popen[str]] = []

    def start(task: int, node: str = "node", lease_seconds: float = 1.0) -> subprocess.Popen[str]:
        arguments = [str(tmp_path / "store"), str(tmp_path / node), str(task), str(lease_seconds)]
        process = subprocess.Popen(
            [sys.executable, "-c", ENSURE, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "HF_HUB_DISABLE_XET": "1"},
        )
        tasks.append(process)
        return process

    yield start
    for process in tasks:
        if process.poll() is None:
            process.kill()
        process.communicate()


def reference_of(process: subprocess.Popen[str]) -> dict:
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    return json.loads(out)


def test_four_processes_on_four_nodes_make_one_download(own_hub, start, files):
    # Nobody dies here: on a busy machine a short lease would be taken from a living holder.
    tasks = [start(number, node=f"node-{number}", lease_seconds=60) for number in range(4)]
    references = [reference_of(task) for task in tasks]
    assert len({reference["key"] for reference in references}) == 1
    assert len({reference["commit_hash"] for reference in references}) == 1
    assert own_hub.log.file_bytes() == sum(map(len, files.values()))


def test_when_the_holder_is_killed_another_takes_over_and_resumes(
    own_hub, start, files, store, cache, read_tree, tmp_path: Path
):
    # The third shard stops in the middle: the first two are stored, a part of the third lies in staging.
    own_hub.faults.truncate_next(1, after_bytes=200_000, path="/lfs/*00003*")
    gate = own_hub.faults.hold_next(1, path="/lfs/*00003*", method="GET")
    holder = start(0)
    assert gate.wait_until_held()
    waiting = start(1)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    gate.open()
    reference = reference_of(waiting)

    begun, *resumed = own_hub.log.entries(path="/lfs/*00003*")
    assert begun.range is None
    assert {entry.range for entry in resumed} == {"bytes=200000-"}
    assert own_hub.log.file_bytes(path="*00001-of*") == len(files["model-00001-of-00004.safetensors"])
    assert own_hub.log.file_bytes(path="*00002-of*") == len(files["model-00002-of-00004.safetensors"])
    assert read_tree(load_directory(store, reference, tmp_path / "out", cache=cache)) == files


def test_on_another_node_what_was_stored_is_not_downloaded_again(own_hub, start, files, store):
    gate = own_hub.faults.hold_next(1, path=SHARD, method="GET")
    holder = start(0, node="first")
    assert gate.wait_until_held()
    waiting = start(1, node="second")
    holder.kill()
    holder.wait()
    gate.open()
    reference_of(waiting)
    for number in (1, 2):
        assert own_hub.log.file_bytes(path=f"*0000{number}-of*") == 300_000
    # Small files neither, although the hub does not tell their sha256.
    for name in ("README.md", "config.json", "tokenizer/vocab.txt"):
        assert own_hub.log.file_bytes(path=f"*/{name}") == len(files[name]), name
    # The note of them is gone with the manifest.
    assert list(store.list("arrivals")) == []


def test_downloads_into_two_datastores_on_one_node_keep_apart(
    own_hub, snapshots, request_for, files, cache, read_tree, tmp_path: Path
):
    own_hub.faults.truncate_next(1, after_bytes=200_000, path="/lfs/*00003*")
    gate = own_hub.faults.hold_next(1, path="/lfs/*00003*", method="GET")
    stores = [open_store(tmp_path / name) for name in ("mine", "theirs")]
    with ThreadPoolExecutor(1) as other:
        held = other.submit(snapshots(store=stores[0]).ensure, request_for())
        assert gate.wait_until_held()
        references = [snapshots(store=stores[1]).ensure(request_for())]
        gate.open()
        references.insert(0, held.result())
    for store, reference in zip(stores, references, strict=True):
        place = NodeCache(tmp_path / "fresh").new_work_dir("out")
        assert (
            read_tree(load_directory(store, reference, place, cache=NodeCache(tmp_path / "fresh"))) == files
        )
        assert read_tree(load_directory(store, reference, tmp_path / "here", cache=cache)) == files
    assert [path for path in (cache.root / "staging").rglob("*") if path.is_file()] == []


def test_an_interrupted_download_leaves_nothing_visible(own_hub, start, store):
    gate = own_hub.faults.hold_next(1, path=SHARD, method="GET")
    holder = start(0)
    assert gate.wait_until_held()
    holder.kill()
    holder.wait()
    gate.open()
    assert list(store.list("manifests")) == []
    assert list(store.list("snapshots")) == []
