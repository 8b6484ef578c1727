"""A process that dies at any of its writes leaves nothing half-visible, and the next one finishes the work."""

import concurrent.futures
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metaflow_hf.hub import fetch
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

    def __init__(self, inner: Any, at: int, *, after: bool, dies: Callable[[], object] = bool) -> None:
        self._inner, self._at, self._after, self._dies = inner, at, after, dies
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
            if self.is_dead:
                self._dies()
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


@pytest.fixture
def late_to_hear(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that waits for all files hears of a failure when another file could have come."""

    def wait(*arguments, **keywords):
        done = concurrent.futures.wait(*arguments, **keywords)
        time.sleep(0.05)
        return done

    monkeypatch.setattr(fetch, "wait", wait)


def test_a_download_killed_at_any_write(
    own_hub, snapshots, request_for, read_tree, files, tmp_path: Path, late_to_hear
):
    kills, at = 0, 0
    while kills == at:
        after = at % 2 == 1
        store = open_store(f"memory://killed-{tmp_path.name}-{at}")
        node = NodeCache(tmp_path / f"node-{at}")
        options = {"cache": node, "lease_seconds": 0.2}
        asked: list[int] = []
        mortal = Mortal(store, at, after=after, dies=lambda seen=asked: seen.append(own_hub.log.count()))
        with own_hub.log.new() as log:
            try:
                snapshots(store=mortal, **options).ensure(request_for(max_workers=1))
            except Killed:
                kills += 1
                assert asked == [own_hub.log.count()], "a dead process asked for another file"
            assert_all_visible_is_whole(store, tmp_path)
            reference = snapshots(store=store, **options).ensure(request_for(max_workers=1))
        assert read_tree(load_directory(store, reference, tmp_path / str(at), cache=node)) == files
        # No shard came twice, whenever it was.
        assert log.file_bytes(path="/lfs/*") == 4 * 300_000
        at += 1
    assert kills >= 13


@pytest.mark.parametrize(("at", "workers"), [(151, 1), (150, 8)])
def test_what_is_stored_does_not_come_again_to_another_node(
    own_hub, snapshots, request_for, tmp_path: Path, at: int, workers: int
):
    small = {f"part-{n:03d}.json": json.dumps({"n": n}).encode() for n in range(90)}
    own_hub.content.add("acme/small", small)
    store = open_store(f"memory://killed-{tmp_path.name}")
    wish = request_for("acme/small", max_workers=workers)
    with pytest.raises(Killed):
        snapshots(
            store=Mortal(store, at, after=True), cache=NodeCache(tmp_path / "first"), lease_seconds=0.2
        ).ensure(wish)
    stored = {store.get(info.key) for info in store.list("blobs")}
    with own_hub.log.new() as log:
        snapshots(store=store, cache=NodeCache(tmp_path / "second"), lease_seconds=0.2).ensure(wish)
    came = {entry.path.rpartition("/")[2] for entry in log.entries(method="GET") if entry.is_file}
    assert came == {name for name, data in small.items() if data not in stored}
    assert list(store.list("arrivals")) == []


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
