import ast
import dataclasses

import pytest

from metaflow_hf import events as ev
from metaflow_hf.report import Outcome, Plan, plan_text, summary_text
from metaflow_hf.report.outcome import load_snippet, sample_pairs
from metaflow_hf.report.text import plain

PLAN = Plan(
    base_model="gpt2",
    model_commit="607a30d783dfa663caf39e06633721c8d4cfcd7e",
    parameters=124_439_808,
    dataset="hf://wikitext",
    dataset_commit="b08601e04326c79dfdd32d625aee71d232d685c3",
    samples=9600,
    heldout_samples=256,
    tokens=4_800_000,
    claims=960,
    claim_samples=10,
    steps=4800,
    rounds=48,
    workers=2,
    batch_size=8,
    sequence_length=1024,
    memory_bytes=2_100_000_000,
    seconds=725.0,
    lineage="TrainFlow-17",
    notes=("chunk_size auto is 2,048: the rollout's estimate of 1.9 GiB fits into the 8 GiB that are free",),
)


def evaluated(name, loss, perplexity, bits):
    return ev.Evaluated(
        time=0, name=name, loss=loss, perplexity=perplexity, bits_per_byte=bits, tokens=52_341, bytes=187_212
    )


MODEL = {"type": "model", "key": "models/TrainFlow/17/merge/5/final-8c1f.json", "size": 5_812_331}
OUTCOME = Outcome(
    plan=PLAN,
    before=evaluated("before", 8.32, 4105.2, 3.356),
    after=evaluated("after", 2.71, 15.03, 1.093),
    unigram=evaluated("unigram", 6.05, 424.1, 2.441),
    xz_bits_per_byte=2.05,
    samples=(
        ev.Sampled(time=0, name="before", prompt="The", text="zz qq"),
        ev.Sampled(time=0, name="after", prompt="The", text=" list\nof"),
    ),
    model=MODEL,
    tokens=4_790_000,
    seconds=725.0,
    card="cards/1.html",
)


def test_plan():
    assert plan_text(PLAN) == (
        "Plan\n"
        "  base model  gpt2 @ 607a30d783df\n"
        "  parameters  124M, all trained\n"
        "  dataset     hf://wikitext @ b08601e04326\n"
        "  samples     9,600, 256 more held out\n"
        "  tokens      about 4,800,000\n"
        "  claims      960, of 10 samples each\n"
        "  steps       about 4,800 of 8 sequences x 1,024 tokens\n"
        "  rounds      about 48\n"
        "  workers     2\n"
        "  memory      about 2 GiB a worker for weights, gradients and optimizer\n"
        "  time        about 12 min\n"
        "  lineage     TrainFlow-17\n"
        "  note: chunk_size auto is 2,048: the rollout's estimate of 1.9 GiB fits into the 8 GiB that are free"
    )


def test_plan_leaves_out_what_is_not_known():
    assert plan_text(Plan(base_model="m", dataset="d")).split() == [
        "Plan",
        "base",
        "model",
        "m",
        "dataset",
        "d",
        "workers",
        "1",
    ]


def test_plan_says_how_much_of_the_model_is_trained():
    lora = dataclasses.replace(PLAN, trainable_parameters=811_008)
    assert "parameters  124M, 811k of them trained (0.65 %)" in plan_text(lora)


def test_summary():
    assert summary_text(OUTCOME) == (
        "Result\n"
        "  base model  gpt2 @ 607a30d783df\n"
        "  dataset     hf://wikitext @ b08601e04326\n"
        "  trained     4,790,000 tokens in 12 min (6.6k tokens/s)\n"
        "\n"
        "Held-out text\n"
        "                   loss (nats/token)  perplexity  bits per byte\n"
        "  before training              8.320       4,105          3.356\n"
        "  after training               2.710        15.0          1.093\n"
        "  unigram model                6.050       424.1          2.441\n"
        "  xz -9                                                   2.050\n"
        "  measured on 52,341 tokens, 183 KiB of text that no worker trained on\n"
        "\n"
        "Samples\n"
        '  prompt: "The"\n'
        "  before | zz qq\n"
        "  after  |  list\n"
        "         | of\n"
        "\n"
        "Model\n"
        "  reference\n"
        "    {\n"
        '      "type": "model",\n'
        '      "key": "models/TrainFlow/17/merge/5/final-8c1f.json",\n'
        '      "size": 5812331\n'
        "    }\n"
        "  load it, wherever this datastore is configured, by\n"
        "    from metaflow import load_model\n"
        "\n"
        '    load_model("models/TrainFlow/17/merge/5/final-8c1f.json", "my-model")\n'
        "  card  cards/1.html"
    )


def test_summary_of_nothing_measured():
    assert summary_text(Outcome(plan=Plan(base_model="m", dataset="d"))) == (
        "Result\n  base model  m\n  dataset     d"
    )


def test_summary_of_a_diverged_run_and_skipped_claims():
    diverged = dataclasses.replace(
        OUTCOME, after=evaluated("after", float("nan"), float("inf"), float("nan")), skipped_positions=3
    )
    text = summary_text(diverged)
    assert "nan         inf            nan" in text
    assert "3 claims failed again and again and are in no model" in text


@pytest.mark.parametrize("run", ["", "TrainFlow/17"])
def test_the_lines_that_load_the_model_are_python(run):
    snippet = load_snippet(dataclasses.replace(OUTCOME, run_pathspec=run))
    ast.parse(snippet)
    assert (run or MODEL["key"]) in snippet


def test_hostile_text_cannot_reach_the_terminal(hostile):
    samples = (
        ev.Sampled(time=0, name="after", prompt="\x1b]0;x\x07", text=hostile + "\r\u2028\u202e" + "w" * 500),
    )
    text = summary_text(dataclasses.replace(OUTCOME, samples=samples))
    assert all(char.isprintable() for line in text.split("\n") for char in line)
    assert max(len(line) for line in text.split("\n")) < 120
    assert text.count("w") >= 500
    assert plain("é日本\t\n") == "é日本\t\n"


def test_samples_pair_by_prompt():
    samples = (
        ev.Sampled(time=0, name="before", prompt="a", text="1"),
        ev.Sampled(time=0, name="before", prompt="b", text="2"),
        ev.Sampled(time=0, name="after", prompt="b", text="3"),
    )
    assert sample_pairs(samples) == [("a", "1", None), ("b", "2", "3")]
