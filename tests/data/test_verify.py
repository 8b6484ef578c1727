"""Any flipped bit, cut or lost file of a dataset is found, and named."""

import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaflow_hf.data import build_blocks, verify_blocks
from metaflow_hf.data.sharded import ShardedDataset
from metaflow_hf.errors import SelectionError
from metaflow_hf.store import open_store


@pytest.fixture(scope="module", params=[None, "zstd", "shards"])
def built(request, tmp_path_factory):
    """A dataset of each layout, each block with a commit of its own."""
    directory = tmp_path_factory.mktemp("built")
    (directory / "raw").mkdir()
    for number, rows in enumerate((range(1000), range(1000, 1200))):
        path = directory / f"raw/{number}.jsonl"
        path.write_text("".join(f'{{"text":"row {i}"}}\n' for i in rows))
    if request.param == "shards":
        plan = ShardedDataset.plan(directory / "raw", samples_per_block=500)
        plan.build(range(2), open_store(directory / "out"))
        plan.assemble(open_store(directory / "out"))
    else:
        build_blocks(directory / "raw", directory / "out", samples_per_block=500, compression=request.param)
    return directory / "out"


def files_of(directory):
    return sorted(p for p in directory.rglob("*") if p.is_file() and "leases" not in p.parts)


def test_an_untouched_dataset_has_no_problems(built):
    assert verify_blocks(built) == []


def test_any_flipped_bit_is_found_and_its_file_named(built):
    files = files_of(built)

    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(data=st.data())
    def check(data):
        path = data.draw(st.sampled_from(files))
        whole = path.read_bytes()
        damaged = bytearray(whole)
        at = data.draw(st.integers(0, len(whole) - 1))
        damaged[at] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(damaged)
        try:
            problems = verify_blocks(built)
        finally:
            path.write_bytes(whole)
        assert problems, f"a flipped bit at {at} of {path.name} was not found"
        if path.suffix != ".json":
            assert path.name.partition(".")[0] in str(problems[0])

    check()
    assert verify_blocks(built) == []


def test_any_lost_file_is_found(built, tmp_path):
    for path in files_of(built):
        if path.suffix == ".idx" and ".zst" not in path.name:
            continue  # an index is built again by whoever needs it
        whole = path.read_bytes()
        path.unlink()
        try:
            # Without its manifest a dataset still is its commits.
            assert verify_blocks(built) or path.name == "block_manifest.json", path
        finally:
            path.write_bytes(whole)


@pytest.mark.parametrize("damage", ["cut", "gone", "more", "empty"])
def test_other_damage_of_a_block_is_found(damage, built, tmp_path):
    shutil.copytree(built, tmp_path / "copy")
    path, *_ = (tmp_path / "copy").rglob("block_00001.jsonl*")
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"cut": data[:-1], "more": data + b"{}\n", "empty": b""}[damage])
    problems = verify_blocks(tmp_path / "copy")
    assert [problem.file.rpartition("/")[2] for problem in problems] == [path.name]


def test_a_block_that_was_changed_together_with_its_index_is_found(built, tmp_path):
    shutil.copytree(built, tmp_path / "copy")
    [second] = (tmp_path / "copy").rglob("block_00001.idx")
    for path in second.parent.glob("block_00001*"):
        shutil.copy(path.with_name(path.name.replace("00001", "00000")), path)
    files = {problem.file.rpartition("/")[2] for problem in verify_blocks(tmp_path / "copy")}
    assert {file.partition(".")[0] for file in files} == {"block_00001"}


def test_where_there_is_no_dataset(tmp_path):
    with pytest.raises(SelectionError, match="no dataset"):
        verify_blocks(tmp_path / "empty")
