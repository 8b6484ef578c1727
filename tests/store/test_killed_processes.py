"""Processes that are really killed at their writes to an S3 server: what is visible is whole, and the next goes on."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from metaflow_hf.store import open_store
from metaflow_hf.store.checkpoints import CheckpointTask, newest_checkpoint
from metaflow_hf.store.manifests import read_manifests

WORK = """
import os, signal, sys
from pathlib import Path
from metaflow_hf.hub.records import RunContext
from metaflow_hf.hub.request import SnapshotRequest
from metaflow_hf.hub.snapshots import Snapshots
from metaflow_hf.store import open_store
from metaflow_hf.store.checkpoints import CheckpointTask, save_checkpoint
from metaflow_hf.store.models import load_directory, save_directory
from metaflow_hf.store.node_cache import NodeCache
from metaflow_hf.store.obstore_backend import ObstoreBackend

root, node, when, prefix = sys.argv[1:]

def mortal(write, position):
    def wrapped(*arguments, **keywords):
        is_it = arguments[position].startswith(f"{prefix}/")
        if is_it and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        answer = write(*arguments, **keywords)
        if is_it:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer
    return wrapped

for name, position in {"create": 1, "put": 1, "upload": 2, "take": 2}.items():
    setattr(ObstoreBackend, name, mortal(getattr(ObstoreBackend, name), position))
store, cache = open_store(root), NodeCache(Path(node))
run = RunContext("F", "1", "s", "2", "user:me")
request = SnapshotRequest.of("gpt2", allow_patterns=["*.json", "*.safetensors"])
base = Snapshots(store, cache, run=run, lease_seconds=1.0).ensure(request)
place = load_directory(store, base, Path(node, "state"), cache=cache)
save_checkpoint(store, place, CheckpointTask(flow="F", run="1", step="s", task="2"))
save_directory(store, place, flow="F", run="1", step="s", task="2")
print("done")
"""


def test_kills_at_each_kind_of_write_to_s3(hub, s3_root: str, tmp_path: Path):
    store = open_store(s3_root)

    def run(when: str, prefix: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-c", WORK, s3_root, str(tmp_path / "node"), when, prefix],
            env=dict(os.environ),
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )

    who = CheckpointTask(flow="F", run="1", step="s", task="2")
    with hub.log.new() as log:
        for when, prefix, visible in (
            ("after", "blobs", []),
            ("before", "manifests", []),
            ("after", "checkpoints", ["manifests", "checkpoints"]),
            ("before", "models", ["manifests", "checkpoints"]),
            ("never", "", ["manifests", "checkpoints", "models"]),
        ):
            done = run(when, prefix)
            ends = (0, "done") if when == "never" else (-signal.SIGKILL, "")
            assert (done.returncode, done.stdout.strip()) == ends, done.stderr
            seen = {
                kind: list(read_manifests(store, kind)) for kind in ("manifests", "checkpoints", "models")
            }
            assert [kind for kind, found in seen.items() if found] == visible
            for _, manifest in (item for found in seen.values() for item in found):
                for file in manifest.files:
                    assert store.download(file.blob, tmp_path / "blob", expected=file.digest) == file.digest
    assert log.count(path="/lfs/*/model.safetensors", method="GET") <= 2
    newest = newest_checkpoint(store, who, any_run=False)
    assert newest is not None
    assert newest.version == 3
