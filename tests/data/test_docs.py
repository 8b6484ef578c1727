"""docs/data.md is executable, and resumes at a chunk."""

import json
import re
from pathlib import Path

import pytest
import torch

from metaflow_hf.config import TrainConfig, parse_yaml
from metaflow_hf.data import BlockManager, ChunkTracker
from metaflow_hf.demo import tiny_models, tiny_tokenizers

TEXT = (Path(__file__).parents[2] / "docs" / "data.md").read_text("utf-8")
ROWS = [f"row {number} of a file" for number in range(60)]


def blocks_of(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tiny_models.llama_config(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=1
    )
    files = {
        "config.json": tiny_models.config_file(config),
        "model.safetensors": tiny_models.safetensors_file(tiny_models.llama_weights(config, 1)),
        **tiny_tokenizers.byte_level_bpe(ROWS, 300),
        **tiny_tokenizers.bpe_config(2048),
    }
    (tmp_path / "model").mkdir()
    for name, data in files.items():
        (tmp_path / "model" / name).write_bytes(data)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS))
    return tmp_path


def run(code: str, trained: list[list[int]], *, stop_after: int = 100) -> None:
    """The loop of the page with smaller chunks; ``trained`` gets the tokens of each batch, in order."""
    from metaflow_hf.data import batches

    class Stopped(Exception):
        pass

    def make_batches(documents, **sizes):
        if len(trained) == stop_after:
            raise Stopped
        made = plain(documents, **sizes)
        trained.append(
            [token for batch in made for token in batch.input_ids[batch.attention_mask.bool()].tolist()]
        )
        return made

    plain = batches.make_batches
    batches.make_batches = make_batches
    try:
        exec(code.replace("4_000", "7").replace("sleep(1)", "sleep(0.05)"), {})
    except Stopped:
        pass
    finally:
        batches.make_batches = plain


def test_the_loop_trains_every_row_once_and_goes_on_where_it_stopped(place):
    torch.set_num_threads(1)
    code = blocks_of("python")[-1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    first: list[list[int]] = []
    run(code, first, stop_after=4)
    with (
        BlockManager("rows.jsonl", dataset_chunk_size=7) as blocks,
        ChunkTracker("progress", blocks) as tracker,
    ):
        assert tracker.get_progress_stats()["done_chunks"] == 4
    rest: list[list[int]] = []
    run(code, rest)
    with (
        BlockManager("rows.jsonl", dataset_chunk_size=7) as blocks,
        ChunkTracker("progress", blocks) as tracker,
    ):
        assert tracker.check_epoch_complete()
    uninterrupted: list[list[int]] = []
    run(code.replace('"progress"', '"other"'), uninterrupted)
    assert (len(first), len(rest)) == (4, 5)
    # Which free chunk comes next is left to chance; what is in it is not.
    assert sorted(first + rest) == sorted(uninterrupted)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("model")
    texts = tokenizer.decode([token for tokens in uninterrupted for token in tokens]).split(
        tokenizer.eos_token
    )
    assert sorted(texts[:-1]) == sorted(ROWS)


def test_rows_are_looked_at(place, capsys):
    code, *_ = blocks_of("python")
    exec(code, {})
    assert capsys.readouterr().out.splitlines() == [str({"text": row}) for row in ROWS[:6]]


def test_rows_of_ones_own_become_blocks(place):
    exec(blocks_of("python")[2], {})
    with BlockManager("mine") as blocks:
        assert blocks.manifest.total_samples == 4_999
        assert blocks.get_chunk(0, 0)[1] == "row 2"


def test_its_configuration_is_valid():
    columns, mixture, sizes = (TrainConfig.parse(parse_yaml(block)) for block in blocks_of("yaml"))
    assert columns.data.columns == {"instruction": "question", "output": "answer"}
    assert mixture.data.datasets
    assert sizes.rollout.chunk_size == "auto"


def test_its_options_are_those_of_the_configuration():
    for name in re.findall(r"^- `(\w+)`:", TEXT, re.MULTILINE):
        assert name in TrainConfig().data.model_dump()


def test_a_format_of_ones_own_is_recognized(capsys):
    exec(blocks_of("python")[1], {})
    assert capsys.readouterr().out == "riddles (solution: solution, riddle: riddle)\n"
