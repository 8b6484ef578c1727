"""The calls that this project was created from, as they stand in its first description (but for the import)."""

import json
from pathlib import Path

import pytest

from metaflow_hf.data import ChunkTracker
from metaflow_hf.demo.content import HubContent

DESCRIPTION = Path(__file__).parents[3] / "shared" / "seeds" / "dataset-and-training-data-flow.md"

CONVERT = """
block_info = process_raw_dataset_to_blocks(
    input_path=Path("raw_dataset/"),
    output_dir=Path("blocked_dataset/"),
    dataset_name="my_dataset",
    block_size=100000
)
"""

READ = """
block_manager = BlockManager(
    dataset_path="hf://dataset_name",
    samples_per_block=100000,     # 100k samples per block
    dataset_chunk_size=4000,      # 4k samples per chunk
)
"""

NAMES = "from pathlib import Path\nfrom metaflow_hf.data import BlockManager, process_raw_dataset_to_blocks\n"
# A block and two chunks, the last of which is not full.
ROWS = [{"id": number, "text": f"row {number}"} for number in range(6_500)]


@pytest.fixture
def place(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines(rows) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@pytest.mark.skipif(not DESCRIPTION.exists(), reason="the first description lies elsewhere")
@pytest.mark.parametrize("example", [CONVERT, READ])
def test_they_are_what_was_described(example: str):
    assert example in DESCRIPTION.read_text("utf-8")


def test_raw_files_become_blocks(place: Path):
    (place / "raw_dataset").mkdir()
    (place / "raw_dataset" / "a.jsonl").write_bytes(lines(ROWS[:4_000]))
    (place / "raw_dataset" / "b.jsonl").write_bytes(lines(ROWS[4_000:]))
    found: dict = {}
    exec(NAMES + CONVERT, found)
    info = found["block_info"]
    assert (info.dataset_name, info.total_samples, info.total_blocks) == ("my_dataset", 6_500, 1)
    assert (place / "blocked_dataset/blocks/block_00000.jsonl").read_bytes() == lines(ROWS)
    written = json.loads((place / "blocked_dataset/block_manifest.json").read_text())
    assert (written["block_size"], written["is_complete"]) == (100_000, True)


def test_a_dataset_of_the_hub_is_read_chunk_by_chunk_and_each_is_trained_once(start_hub, place: Path):
    content = HubContent()
    content.add(
        "dataset_name", lambda: {"train.jsonl": lines(ROWS)}, repo_type="dataset", tags=("modality:text",)
    )
    content.rename("dataset_name", "owner/dataset_name", repo_type="dataset")
    start_hub(content)
    found: dict = {}
    exec(NAMES + READ, found)
    with found["block_manager"] as block_manager:
        block = block_manager.get_block(0)
        assert (block.total_samples, block.is_last_block, block.chunk_count(4_000)) == (6_500, True, 2)
        assert block_manager.get_chunk(0, 1, 4_000) == [row["text"] for row in ROWS[4_000:]]
        assert block_manager.get_chunk(block_id=0, chunk_id=1, chunk_size=3_000)[0] == "row 3000"
        with (
            ChunkTracker(place / "state", block_manager, worker_id="GPU 0") as first,
            ChunkTracker(place / "state", block_manager, worker_id="GPU 1") as second,
        ):
            claims = [first.claim_chunk(), second.claim_chunk()]
            assert {claim.chunk_id for claim in claims} == {0, 1}
            first.mark_chunk_complete(claims[0])
            assert not first.check_epoch_complete()
            second.mark_chunk_complete(claims[1])
            assert first.check_epoch_complete()
            assert first.claim_chunk() is None
