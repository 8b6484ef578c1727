"""Any flipped bit, cut or lost file of a dataset is found, and named."""

import random
import shutil

import pytest

from metaflow_hf.data import build_blocks, verify_blocks
from metaflow_hf.errors import SelectionError


@pytest.fixture(scope="module", params=[None, "zstd"])
def built(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("built")
    (directory / "raw.jsonl").write_text("".join(f'{{"text":"row {i}"}}\n' for i in range(1200)))
    build_blocks(directory / "raw.jsonl", directory / "out", samples_per_block=500, compression=request.param)
    return directory / "out"


def files_of(directory):
    return sorted(p for p in directory.rglob("*") if p.is_file() and "leases" not in p.parts)


def test_an_untouched_dataset_has_no_problems(built):
    assert verify_blocks(built) == []


def test_any_flipped_bit_is_found_and_its_file_named(built, tmp_path):
    chance = random.Random(0)
    for number, path in enumerate(files_of(built) * 3):
        copy = tmp_path / str(number)
        shutil.copytree(built, copy)
        target = copy / path.relative_to(built)
        data = bytearray(target.read_bytes())
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        target.write_bytes(data)
        problems = verify_blocks(copy)
        assert problems, f"a flipped bit in {path.name} was not found"
        if path.suffix != ".json":
            assert path.name.partition(".")[0] in str(problems[0])


@pytest.mark.parametrize("damage", ["cut", "gone", "more", "empty"])
def test_other_damage_of_a_block_is_found(damage, built, tmp_path):
    shutil.copytree(built, tmp_path / "copy")
    [path] = (tmp_path / "copy/blocks").glob("block_00001.jsonl*")
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"cut": data[:-1], "more": data + b"{}\n", "empty": b""}[damage])
    problems = verify_blocks(tmp_path / "copy")
    assert [problem.file for problem in problems] == [path.name]


def test_a_block_that_was_changed_together_with_its_index_is_found(built, tmp_path):
    shutil.copytree(built, tmp_path / "copy")
    for first, second in zip(sorted((tmp_path / "copy/blocks").glob("block_00000*")),
                             sorted((tmp_path / "copy/blocks").glob("block_00001*")), strict=True):  # fmt: skip
        shutil.copy(first, second)
    assert {problem.file.partition(".")[0] for problem in verify_blocks(tmp_path / "copy")} == {"block_00001"}


def test_where_there_is_no_dataset(tmp_path):
    with pytest.raises(SelectionError, match="no dataset"):
        verify_blocks(tmp_path / "empty")
