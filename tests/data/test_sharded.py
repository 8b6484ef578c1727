"""A dataset built shard by shard is the same dataset whoever builds which shard, however often, killed anywhere."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from metaflow_hf.data import BlockManager, build_blocks, verify_blocks
from metaflow_hf.data.sharded import ShardedDataset
from metaflow_hf.errors import ConfigError, DatasetMismatch, IntegrityError, NotFound
from metaflow_hf.store import open_store

SIZES = (53, 1, 20, 0, 37)  # rows of each file; blocks of 10


@pytest.fixture
def source(tmp_path, make_rows, write_jsonl):
    rows = iter(make_rows(sum(SIZES)))
    for number, count in enumerate(SIZES):
        write_jsonl([next(rows) for _ in range(count)], f"source/part-{number}.jsonl")
    return tmp_path / "source"


def content(directory):
    """Every byte of a dataset; leases only say who was there."""
    files = (path for path in directory.rglob("*") if path.is_file() and "leases" not in path.parts)
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def build_in_branches(source, directory, branches):
    plan = ShardedDataset.plan(source, samples_per_block=10)
    for group in plan.groups(branches):
        ShardedDataset.from_json(json.loads(json.dumps(plan.to_json()))).build(group, open_store(directory))
    return plan.assemble(open_store(directory))


def test_any_number_of_branches_gives_the_same_bytes(source, tmp_path, make_rows, read_through_manager):
    manifests = [build_in_branches(source, tmp_path / str(n), n) for n in (1, 2, 3)]
    assert len({manifest.digest for manifest in manifests}) == 1
    first = content(tmp_path / "1")
    assert all(content(tmp_path / str(n)) == first for n in (2, 3))
    assert read_through_manager(tmp_path / "3") == [row["text"] for row in make_rows(sum(SIZES))]
    assert verify_blocks(tmp_path / "3") == []


def test_blocks_are_full_except_the_last_of_each_shard(source, tmp_path):
    manifest = build_in_branches(source, tmp_path / "out", 2)
    assert [block.sample_count for block in manifest.blocks] == [10] * 5 + [3, 1, 10, 10] + [10] * 3 + [7]
    assert [block.block_id for block in manifest.blocks] == list(range(13))
    starts = [block.start_index for block in manifest.blocks]
    assert starts == [0, 10, 20, 30, 40, 50, 53, 54, 64, 74, 84, 94, 104]
    stored = json.loads((tmp_path / "out/block_manifest.json").read_text())
    assert (stored["is_complete"], stored["total_samples"], stored["total_blocks"]) == (True, 111, 13)
    for block in stored["blocks"]:
        lines = (tmp_path / "out" / block["file_path"]).read_bytes().splitlines()
        assert len(lines) == block["sample_count"]


def test_it_is_another_dataset_than_one_sequence_of_full_blocks(source, tmp_path):
    plan = ShardedDataset.plan(source, samples_per_block=10)
    plan.build(range(5))
    plan.assemble()
    whole = build_blocks(source, samples_per_block=10)
    root = tmp_path / "node-cache"
    assert len(list((root / "datasets").iterdir())) == 2
    assert (root / plan.key / "block_manifest.json").exists()
    assert whole.digest != plan.assemble().digest
    with pytest.raises(DatasetMismatch, match="by_shard"):
        build_blocks(source, root / plan.key, samples_per_block=10)


def test_branches_have_about_equal_bytes_and_none_is_empty():
    plan = ShardedDataset.from_json({"location": "x", "spec": SPEC, "sizes": [5, 100, 1, 50, 49, 3]})
    assert plan.groups(1) == [[0, 1, 2, 3, 4, 5]]
    assert plan.groups(2) == [[1, 2, 5], [0, 3, 4]]
    assert plan.groups(3) == [[1], [2, 3, 5], [0, 4]]
    for branches in (1, 2, 3, 6, 50):
        groups = plan.groups(branches)
        assert len(groups) == min(branches, 6)
        assert sorted(shard for group in groups for shard in group) == list(range(6))
        assert all(groups)
    with pytest.raises(ConfigError, match="num_branches"):
        plan.groups(0)


SPEC = {"dataset_name": "x", "source": "file:x"}


def test_the_join_is_idempotent_and_names_what_is_missing(source, tmp_path):
    plan = ShardedDataset.plan(source, samples_per_block=10)
    store = open_store(tmp_path / "out")
    plan.build([0, 1, 3], store)
    with pytest.raises(NotFound, match=r"2 of 5 shards are not complete \(2, 4"):
        plan.assemble(store)
    assert not (tmp_path / "out/block_manifest.json").exists()
    plan.build([4, 2], store)
    first = plan.assemble(store)
    before = content(tmp_path / "out")
    # A join that was killed between its two records.
    (tmp_path / "out/commits/complete.json").unlink()
    assert plan.assemble(store) == plan.assemble(store) == first
    assert content(tmp_path / "out") == before


KILLED = """
import os, signal, sys
from metaflow_hf.data.sharded import ShardedDataset
from metaflow_hf.store import open_store
seen = 0
def progress(shard, manifest):
    global seen
    seen += 1
    if seen == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
plan = ShardedDataset.plan(sys.argv[1], samples_per_block=10)
plan.build(range(5), open_store(sys.argv[2]), progress=progress, lease_seconds=1)
"""


@pytest.mark.parametrize("at", [2, 6])
def test_a_killed_branch_repeats_its_open_block_only(at, source, tmp_path, subprocess_environment):
    command = [sys.executable, "-c", KILLED, str(source), str(tmp_path / "out"), str(at)]
    killed = subprocess.run(command, env=subprocess_environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    out = tmp_path / "out"
    committed = {path: os.stat(path).st_mtime_ns for path in out.glob("shards/*/blocks/block_*.jsonl")}
    assert committed
    plan = ShardedDataset.plan(source, samples_per_block=10)
    plan.build(range(5), open_store(out), lease_seconds=1)
    manifest = plan.assemble(open_store(out))
    assert manifest.digest == build_in_branches(source, tmp_path / "other", 3).digest
    assert content(out) == content(tmp_path / "other")
    assert all(os.stat(path).st_mtime_ns == written for path, written in committed.items())


def test_what_is_complete_is_not_opened_again(hub, tmp_path):
    plan = ShardedDataset.plan("hf://acme/parquet", samples_per_block=50)
    assert len(plan.sizes) == 2
    assert plan.spec.commit_hash in plan.location
    store = open_store(tmp_path / "out")
    plan.build([0], store)
    told = []
    with hub.log.new() as log:
        plan.build([0], store, progress=lambda shard, manifest: told.append((shard, manifest.total_samples)))
    assert log.count() == 0
    assert told == [(0, 120)]
    with hub.log.new() as log:
        plan.build([0, 1], store)
    assert not log.count(path="*/resolve/*train-00000*")
    assert plan.assemble(store).total_samples == 240


def test_a_source_that_changed_is_noticed(source, tmp_path):
    plan = ShardedDataset.plan(source, samples_per_block=10)
    (source / "part-0.jsonl").write_text('{"text": "other"}\n')
    with pytest.raises(DatasetMismatch, match="not what it was"):
        plan.build([0], open_store(tmp_path / "out"))


@pytest.mark.parametrize("other", [{"samples_per_block": 9}, {"on_bad_row": "skip"}, {"location": "other"}])
def test_complete_shards_of_another_dataset_are_not_taken(source, tmp_path, other):
    there = ShardedDataset.plan(source, samples_per_block=10)
    root = open_store(tmp_path / "out")
    there.build(range(len(there.sizes)), root)
    settings = {"samples_per_block": 10, "location": source, **other}
    if settings["location"] == "other":
        settings["location"] = shutil.copytree(source, tmp_path / "other")
    plan = ShardedDataset.plan(**settings)
    with pytest.raises(DatasetMismatch, match="another dataset"):
        plan.build([0], root)
    with pytest.raises(DatasetMismatch, match="another dataset"):
        plan.assemble(root)


def test_limits_are_refused(source):
    with pytest.raises(ConfigError, match="max_rows"):
        ShardedDataset.plan(source, samples_per_block=10, max_rows=5)


def test_small_documents_share_a_shard(tmp_path, read_through_manager, monkeypatch):
    from metaflow_hf.data import sharded

    monkeypatch.setattr(sharded, "DOCUMENTS_PER_SHARD", 3)
    (tmp_path / "d").mkdir()
    for number in range(7):
        (tmp_path / f"d/{number}.md").write_text(f"document {number}")
    plan = ShardedDataset.plan(tmp_path / "d", samples_per_block=10)
    assert len(plan.sizes) == 3
    plan.build(range(3), open_store(tmp_path / "out"))
    assert plan.assemble(open_store(tmp_path / "out")).total_blocks == 3
    assert read_through_manager(tmp_path / "out") == [f"document {number}" for number in range(7)]


def test_damage_in_a_shard_is_named(source, tmp_path):
    build_in_branches(source, tmp_path / "out", 2)
    path = tmp_path / "out/shards/00002/blocks/block_00001.jsonl"
    path.write_bytes(path.read_bytes().replace(b"row", b"r0w", 1))
    assert any(
        "shards/00002/blocks/block_00001" in str(problem) for problem in verify_blocks(tmp_path / "out")
    )
    with BlockManager(tmp_path / "out") as blocks, pytest.raises(IntegrityError, match="block_00001.jsonl"):
        blocks.get_chunk(8, 0)


def test_a_lost_shard_is_noticed(source, tmp_path):
    build_in_branches(source, tmp_path / "out", 1)
    shutil.rmtree(tmp_path / "out/shards/00004")
    [problem] = verify_blocks(tmp_path / "out")
    assert str(problem) == "block_manifest.json: its blocks are not those of the shards"
