"""A process that dies at any of its writes leaves nothing half-visible, and the next one finishes the work."""

import threading
from pathlib import Path
from typing import Any

from metaflow_hf.store import open_store
from metaflow_hf.store.checkpoints import CheckpointTask, newest_checkpoint, save_checkpoint
from metaflow_hf.store.manifests import read_manifests
from metaflow_hf.store.models import find_manifest, load_directory
from metaflow_hf.store.node_cache import NodeCache

WRITES = ("create", "put", "upload", "delete")


class Killed(BaseException):
    """The process is gone."""


class Mortal:
    """A store whose process dies at its n-th write: before it, or after it and before its answer."""

    def __init__(self, inner: Any, at: int, *, after: bool) -> None:
        self._inner, self._at, self._after = inner, at, after
        self.writes = 0
        self.is_dead = False

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._inner, name)
        if name not in WRITES:
            return attribute

        def write(*arguments, **keywords):
            if threading.current_thread().name.startswith("lease "):
                # It beats when it likes: its writes are not counted, and it goes with the process.
                return None if self.is_dead else attribute(*arguments, **keywords)
            if self.is_dead:
                raise Killed
            self.is_dead = self.writes == self._at
            self.writes += 1
            if self.is_dead and not self._after:
                raise Killed
            answer = attribute(*arguments, **keywords)
            if self.is_dead:
                raise Killed
            return answer

        return write


def assert_all_visible_is_whole(store, place: Path) -> None:
    for info, manifest in read_manifests(store, "manifests"):
        for file in manifest.files:
            assert store.download(file.blob, place / "blob", expected=file.digest) == file.digest, info.key
    for info in store.list("snapshots"):
        find_manifest(store, info.key)


def test_a_download_killed_at_any_write(own_hub, snapshots, request_for, read_tree, files, tmp_path: Path):
    kills, at = 0, 0
    while kills == at:
        after = at % 2 == 1
        store = open_store(f"memory://killed-{tmp_path.name}-{at}")
        node = NodeCache(tmp_path / f"node-{at}")
        options = {"cache": node, "lease_seconds": 0.2}
        mortal = Mortal(store, at, after=after)
        with own_hub.log.new() as log:
            try:
                snapshots(store=mortal, **options).ensure(request_for(max_workers=1))
            except Killed:
                kills += 1
            assert_all_visible_is_whole(store, tmp_path)
            reference = snapshots(store=store, **options).ensure(request_for(max_workers=1))
        assert read_tree(load_directory(store, reference, tmp_path / str(at), cache=node)) == files
        # No shard came twice, whenever it was; of one that was cut, the bytes on their way are lost.
        assert 4 * 300_000 <= log.file_bytes(path="/lfs/*") < 5 * 300_000
        at += 1
    assert kills >= 13


def test_a_checkpoint_killed_at_any_write(tmp_path: Path):
    who = CheckpointTask(flow="F", run="1", step="s", task="2")
    for name in ("a", "b"):
        (tmp_path / "state").mkdir(exist_ok=True)
        (tmp_path / "state" / name).write_text("old")
    kills = at = 0
    while kills == at:
        for after in (False, True):
            store = open_store(f"memory://checkpoint-{tmp_path.name}-{at}-{after}")
            old = save_checkpoint(store, tmp_path / "state", who)
            (tmp_path / "state" / "a").write_text(f"new {at}")
            try:
                save_checkpoint(Mortal(store, at, after=after), tmp_path / "state", who)
            except Killed:
                kills += not after
            (tmp_path / "state" / "a").write_text("old")
            found = newest_checkpoint(store, who, any_run=False)
            assert found is not None
            place = tmp_path / f"{at}-{after}"
            load_directory(store, found, place, cache=NodeCache(tmp_path / "node"))
            expected = "old" if found == old else f"new {at}"
            assert (place / "a").read_text() == expected
            assert save_checkpoint(store, tmp_path / "state", who).version == found.version + 1
        at += 1
    assert kills >= 2
