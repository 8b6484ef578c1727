"""``metaflow hf blocks``: from a source to the tokens of a batch, as tables and as JSON."""

import io
import json
import re
import sys
from pathlib import Path

import pytest
from data.printed import plain_pdf
from metaflow._vendor.click.testing import CliRunner

from metaflow_hf.data import BlockManager, build_blocks
from metaflow_hf.data.progress import BuildLines, BuildProgress, show_on
from metaflow_hf.data.sources import open_source
from metaflow_hf.store import configured_store
from metaflow_hf_cli.fixtures import datasets as given
from metaflow_hf_cli.group import hf

TOKENIZER = "metaflow-hf/tiny-llama"


pytestmark = pytest.mark.usefixtures("project")


def call(*arguments: object, status: int = 0) -> str:
    done = CliRunner().invoke(hf, ["blocks", *map(str, arguments)])
    assert done.exit_code == status, done.output
    assert "Traceback" not in done.output
    return done.output


def call_json(*arguments: object, status: int = 0):
    """What a program reads: stdout holds one JSON document and nothing else."""
    done = CliRunner(mix_stderr=False).invoke(hf, ["blocks", *map(str, arguments), "--json"])
    assert done.exit_code == status, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def texts(project: Path) -> Path:
    path = project / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": "x" * n}) + "\n" for n in range(1, 101)))
    return path


def test_build_says_how_far_it_is_and_where_the_dataset_is(texts):
    lines = call("build", texts, "--samples-per-block", 30).splitlines()
    assert lines[0] == "texts: 100 rows, 6.3 kB in 4 blocks, complete"
    key = lines[-1]
    assert re.fullmatch(r"datasets/texts-\w+", key)
    again = call_json("build", texts, "--samples-per-block", 30)
    assert (again["dataset"], again["total_blocks"], again["is_complete"]) == (key, 4, True)
    with BlockManager(configured_store().child(key)) as blocks:
        assert len(blocks.get_chunk(0, 0)) == 30


def test_build_takes_what_build_blocks_takes(texts):
    call("build", texts, "--output", "out", "--compression", "zstd", "--max-rows", 7, "--num-proc", 2)
    call("build", texts, "--output", "plain", "--max-rows", 7, "--ascii-only", "--text-column", "text")
    assert (Path("out/blocks/block_00000.jsonl.zst")).exists()
    assert len(Path("plain/blocks/block_00000.jsonl").read_text().splitlines()) == 7
    assert call_json("stats", "out")["total_samples"] == 7
    error = call("build", texts, "--output", "out", status=1)
    assert "DatasetMismatch" in error
    assert len(error.strip().splitlines()) == 1


def test_documents_are_one_row_each_or_one_row_a_page(project):
    (project / "letters").mkdir()
    (project / "letters/a.pdf").write_bytes(plain_pdf(["Dear reader.", "Yours."]))
    assert call_json("build", "letters")["total_samples"] == 1
    assert call_json("build", "letters", "--documents", "pages")["total_samples"] == 2
    settings = ("--tokenizer", TOKENIZER, "--documents", "pages")
    assert call_json("preview", "letters", *settings)["rows"] == [0, 2]


def test_a_build_from_the_hub_into_the_datastore_is_listed_verified_and_measured():
    key = call_json("build", f"hf://{given.PARQUET_ID}", "--datastore", "--samples-per-block", 100)["dataset"]
    [found] = [item for item in call_json("ls") if item["place"] == "datastore"]
    assert (found["key"], found["total_samples"], found["is_complete"]) == (key, 240, True)
    row = next(line for line in call("ls").splitlines() if line.startswith("datastore"))
    assert row.split()[1:4] == ["parquet", "240", "3"]
    assert call("verify", key) == "every byte is as written\n"
    assert call("verify", key.removeprefix("datasets/")) == "every byte is as written\n"
    assert call_json("verify", key) == []


def test_verify_names_what_is_not_as_written(texts):
    build_blocks(texts, "out", samples_per_block=30)
    path = Path("out/blocks/block_00002.jsonl")
    path.write_bytes(path.read_bytes().replace(b"x", b"y", 1))
    assert "block_00002.jsonl: its sha256 is" in call("verify", "out", status=1)
    assert [problem["file"] for problem in call_json("verify", "out", status=1)] == ["block_00002.jsonl"]


def test_stats_of_rows_bytes_characters_and_tokens(texts):
    call("build", texts, "--output", "out", "--samples-per-block", 30)
    found = call_json("stats", "out", "--tokenizer", TOKENIZER)
    assert (found["total_samples"], found["total_blocks"], found["skipped_rows"]) == (100, 4, 0)
    assert found["size"] == sum(path.stat().st_size for path in Path("out/blocks").glob("*.jsonl"))
    characters = found["characters"]
    assert (characters["measured"], characters["total"]) == (100, 5050)
    assert (characters["percentiles"]["0"], characters["percentiles"]["100"]) == (1, 100)
    assert characters["percentiles"]["50"] in (50, 51)
    assert found["tokens"]["measured"] == 100
    assert 100 <= found["tokens"]["total"] <= 5050 + 200
    table = call("stats", "out")
    assert "5,050 characters; percentiles of a row:" in table
    assert "min  1%  5%  25%  50%  75%  95%  99%  max" in table
    assert call_json("stats", "out", "--max-rows", 10)["characters"]["measured"] == 10


def test_preview_shows_the_exact_tokens_of_a_batch(texts):
    from transformers import AutoTokenizer

    Path("words.txt").write_text("Return the value.\nA second\x1b[31m row.\n")
    call("build", "words.txt", "--output", "out")
    options = ["--tokenizer", TOKENIZER, "--sequence-length", 16]
    shown = call_json("preview", "out", *options)
    tokens = [token for sequence in shown["sequences"] for token in sequence]
    from metaflow_hf.hub import snapshot_download

    tokenizer = AutoTokenizer.from_pretrained(snapshot_download(TOKENIZER))
    expected = []
    for text in ("Return the value.", "A second\x1b[31m row."):
        ids = tokenizer(text)["input_ids"]
        expected += [*ids, tokenizer.eos_token_id] if ids[-1] != tokenizer.eos_token_id else ids
    assert [token["token"] for token in tokens] == expected
    assert all(len(sequence) <= 16 for sequence in shown["sequences"])
    assert [token["loss"] for token in shown["sequences"][0]][:2] == [False, True]

    plain = call("preview", "out", *options)
    assert "\x1b" not in plain
    assert r"\x1b" in plain
    assert "⟦" in plain
    assert "\x1b[32m" in call("preview", "out", *options, "--color")
    assert "there is no batch 9" in call("preview", "out", *options, "--batch", 9, status=1)
    assert "SelectionError" in call("preview", "out", *options, "--block", 9, status=1)


def test_preview_of_conversations_marks_what_the_assistant_says():
    shown = call_json(
        "preview", f"hf://{given.CHAT_ID}", "--tokenizer", TOKENIZER, "--rows", 1, "--sequence-length", 512
    )
    [sequence] = shown["sequences"]
    said = "".join(token["text"] for token in sequence if token["loss"])
    text = given.rows(5)[0]["text"]
    assert text in said
    assert f"Say: {text}" not in said
    assert f"Say: {text}" in "".join(token["text"] for token in sequence)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("verify", "no-such"), "SelectionError: 'no-such' is no dataset of blocks"),
        (("stats", "no-such"), "blocks ls"),
        (("build", "no-such.jsonl"), "SelectionError"),
        (("build", "hf://acme/photos"), "UnsupportedModalityError"),
        (("preview", "no-such", "--tokenizer", TOKENIZER), "SelectionError"),
        (("build", "texts.jsonl", "--output", "x", "--datastore"), "not both"),
    ],
)
def test_what_goes_wrong_is_one_line(arguments, words, texts):
    text = call(*arguments, status=1)
    assert words in text
    assert len(text.strip().splitlines()) == 1


def test_nothing_stored_is_said():
    assert call("ls") == "no datasets of blocks are stored\n"
    assert call_json("ls") == []


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_lines_say_rows_bytes_speed_and_time_left_once_an_interval(texts):
    clock, said = Clock(), []
    lines = BuildLines(said.append, interval=10, clock=clock)
    told = BuildProgress("texts", lines, total_bytes=1_000_000, clock=clock)
    told.read(100_000)
    assert said == []
    clock.now = 10.0
    told.read(100_000)
    told.read(1)
    assert said == ["texts: 0 rows, 0 B in 0 blocks; read 20% of 1.0 MB, 20.0 kB/s, eta 40 s"]
    told.committed(build_blocks(texts, "out"))
    told.complete()
    assert said[1:] == ["texts: 100 rows, 6.3 kB in 1 block, complete"]


def test_a_metered_source_reads_the_same_and_counts_what_was_read_before(texts, monkeypatch):
    from metaflow_hf.data.manifest import Cursor

    told = BuildProgress("texts", lambda state: None, total_bytes=texts.stat().st_size)
    source = open_source(texts)
    for cursor in (Cursor(), Cursor(file=0, row=99, offset=texts.stat().st_size - 112)):
        rows = [row for batch in source.batches(cursor) for row in rows_of(batch)]
        metered = [row for batch in told.meter(source).batches(cursor) for row in rows_of(batch)]
        assert rows == metered
        assert told.state().read_bytes == texts.stat().st_size
        told = BuildProgress("texts", lambda state: None, total_bytes=texts.stat().st_size)


def rows_of(batch) -> list:
    return list(getattr(batch, "rows", None) or bytes(batch.data).splitlines())


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_is_drawn_where_a_person_watches(texts, monkeypatch):
    from huggingface_hub.utils import are_progress_bars_disabled

    # Whoever imported huggingface_hub first decided for the whole process.
    switches = sys.modules[are_progress_bars_disabled.__module__]
    monkeypatch.setattr(switches, "HF_HUB_DISABLE_PROGRESS_BARS", None)
    monkeypatch.setattr(switches, "progress_bar_states", {})
    terminal = Terminal()
    bar = show_on(terminal, print)
    assert isinstance(show_on(io.StringIO(), print), BuildLines)
    told = BuildProgress("texts", bar, total_bytes=100)
    told.read(50)
    told.committed(build_blocks(texts, "out"))
    told.complete()
    last = terminal.getvalue().rpartition("texts")[2]
    assert last.startswith(": 100%")
    assert "100 rows in 1 blocks" in last
