"""The node's cache stays within its bounds and forgets what nobody will finish."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from metaflow_hf.store import work_dirs
from metaflow_hf.store.eviction import trim
from metaflow_hf.store.node_cache import NodeCache
from metaflow_hf.store.objects import Digest

HOUR = 3600.0


@pytest.fixture
def cache(tmp_path: Path) -> NodeCache:
    return NodeCache(tmp_path / "node")


def add(cache: NodeCache, number: int, used: float, size: int = 1000) -> Path:
    source = cache.root / f"source-{number}"
    source.write_bytes(bytes([number]) * size)
    path = cache.adopt(source, Digest(sha256=f"{number:064x}", size=size))
    os.utime(path.with_name(f"{path.name}.verified"), (used, used))
    return path


def test_the_least_recently_used_go_first(cache: NodeCache):
    blobs = [add(cache, number, used=number * HOUR) for number in range(1, 6)]
    assert trim(cache, max_bytes=2500, now=lambda: 100 * HOUR, force=True) == 3000
    assert [path.exists() for path in blobs] == [False, False, False, True, True]


def test_what_somebody_links_to_or_just_used_stays(cache: NodeCache, tmp_path: Path):
    linked, recent, old = (
        add(cache, n, used) for n, used in ((1, HOUR), (2, 100 * HOUR - 60), (3, 2 * HOUR))
    )
    os.link(linked, tmp_path / "work")
    trim(cache, max_bytes=0, now=lambda: 100 * HOUR, force=True)
    assert [path.exists() for path in (linked, recent, old)] == [True, True, False]


def test_what_cannot_be_removed_fails_nobody_and_keeps_the_rest_in_bounds(
    cache: NodeCache, monkeypatch, caplog
):
    stuck, old = add(cache, 1, used=HOUR), add(cache, 2, used=2 * HOUR)
    part = cache.root / "blobs" / "ab" / "x.part"
    note = cache.root / "work" / "metaflow_hf_x.owner"
    for left, content in (
        (part, "x"),
        (note, json.dumps({**work_dirs.owner_here(note.with_suffix("")), "boot": "before"})),
    ):
        left.parent.mkdir(parents=True)
        left.write_text(content)
    unlink = Path.unlink

    def refuse(path: Path, **options):
        if path in (stuck, part, note):
            raise PermissionError(13, "of another user")
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", refuse)
    later = part.stat().st_mtime + 1000 * HOUR
    assert trim(cache, max_bytes=1000, now=lambda: later, force=True) == 1000
    assert not old.exists()
    assert caplog.text.count("of another user") == 3


def test_it_is_not_done_by_every_task(cache: NodeCache):
    add(cache, 1, used=HOUR)
    assert trim(cache, max_bytes=10_000, now=lambda: 100 * HOUR) == 0
    assert trim(cache, max_bytes=0, now=lambda: 100 * HOUR + 10) == 0
    assert trim(cache, max_bytes=0, now=lambda: 101 * HOUR) == 1000


def test_directories_of_killed_tasks_are_removed_and_those_of_living_ones_stay(cache: NodeCache):
    code = (
        "import os, sys, pathlib; from metaflow_hf.store.node_cache import NodeCache;"
        "print(NodeCache(pathlib.Path(sys.argv[1])).new_work_dir('x')); sys.stdout.flush(); os.kill(os.getpid(), 9)"
    )
    dead = subprocess.run(
        [sys.executable, "-c", code, str(cache.root)], capture_output=True, text=True, check=False
    )
    killed, mine = Path(dead.stdout.strip()), cache.new_work_dir("y")
    assert killed.is_dir()
    trim(cache, force=True)
    assert not killed.exists()
    assert mine.is_dir()
    cache.remove_work_dir(mine)
    assert list((cache.root / "work").iterdir()) == []


def test_directories_of_another_machine_that_shares_the_cache_stay(cache: NodeCache, monkeypatch):
    theirs = cache.new_work_dir("x")
    boot, name = work_dirs.boot_id(), platform.node()
    monkeypatch.setattr(work_dirs, "boot_id", lambda: "of the other machine")
    monkeypatch.setattr(platform, "node", lambda: "other")
    trim(cache, force=True)
    assert theirs.is_dir()
    # What another version noted says less.
    [note] = (cache.root / "work").glob("*.owner")
    full = json.loads(note.read_text())
    note.write_text(json.dumps({key: value for key, value in full.items() if key != "host"}))
    trim(cache, force=True)
    assert theirs.is_dir()
    # The same machine a boot later: nobody is there any more.
    note.write_text(json.dumps({**full, "boot": boot}))
    monkeypatch.setattr(platform, "node", lambda: name)
    trim(cache, force=True)
    assert not theirs.exists()


def test_old_parts_and_staging_go_and_young_ones_stay(cache: NodeCache):
    with cache.staging("hub/models--a/1234") as staging:
        pass
    part = cache.root / "blobs" / "ab" / "x.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x")
    now = part.stat().st_mtime
    trim(cache, now=lambda: now + HOUR, force=True)
    assert staging.exists()
    assert part.exists()
    trim(cache, now=lambda: now + 8 * 24 * HOUR, force=True)
    assert not staging.exists()
    assert not part.exists()
