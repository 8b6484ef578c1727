"""The run as the steps of a flow see it: parameters over configuration, plan, shares of a machine."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer
from transformers.utils.logging import enable_progress_bar

from metaflow_hf.config import TrainConfig
from metaflow_hf.data import BlockManager, build_blocks
from metaflow_hf.data.sizes import chunk_samples
from metaflow_hf.errors import ConfigError, LineageMismatch
from metaflow_hf.events import ClaimDone
from metaflow_hf.report import UnigramModel, plan_text
from metaflow_hf.store import datastore
from metaflow_hf.train import devices
from metaflow_hf.train.description import check_length
from metaflow_hf.train.heldout import Copies, count_copies, evaluation_rows, key_of
from metaflow_hf.train.job import TrainingJob, merged_events
from metaflow_hf.train.speed import tokens_per_second

DEMO = {
    "hub": "embedded",
    "model": {"repo_id": "a/model", "revision": "v1"},
    "data": {"dataset": "hf://a/data", "evaluation_dataset": "hf://a/data:default:test"},
    "rounds": {"workers": 2, "max_tokens": 100},
}


@pytest.fixture(autouse=True)
def _progress_bars_come_back():
    """A task of a flow does without them; the other tests of this process should not."""
    yield
    enable_progress_bar()


def job(values=DEMO, **parameters) -> TrainingJob:
    return TrainingJob.configured(values, run="Flow-1", **parameters)


def test_without_parameters_the_configuration_holds():
    made = job()
    assert made.config == TrainConfig.parse(DEMO)
    assert (made.lineage, made.model_hub, made.data_hub) == ("Flow-1", "embedded", "embedded")
    assert TrainingJob.from_json(json.loads(json.dumps(made.to_json()))) == made


def test_another_model_does_not_inherit_the_revision_nor_the_embedded_hub():
    made = job(repo_id="b/model")
    assert (made.config.model.repo_id, made.config.model.revision) == ("b/model", "main")
    assert (made.model_hub, made.data_hub) == (None, "embedded")
    assert job(revision="v2").config.model.revision == "v2"
    assert job(repo_id="a/model", revision="v3").model_hub == "embedded"


def test_another_dataset_does_not_inherit_the_held_out_one():
    made = job(dataset="hf://b/data")
    assert made.config.data.evaluation_dataset is None
    assert (made.model_hub, made.data_hub) == ("embedded", None)
    assert job(dataset="hf://a/data").config.data.evaluation_dataset is not None


def test_numbers_override():
    made = job(num_gpus=5, max_tokens=7, lineage="mine/too")
    assert (made.config.rounds.workers, made.config.rounds.max_tokens) == (5, 7)
    assert made.lineage == "mine!2Ftoo"
    assert job(num_gpus=0).config.rounds.workers == max(torch.cuda.device_count(), 1)


@pytest.mark.parametrize(
    ("values", "parameters", "said"),
    [
        (DEMO, {"num_gpus": -1}, "--num_gpus -1"),
        (DEMO, {"max_tokens": 0}, "rounds.max_tokens"),
        ({"data": {"dataset": "hf://a/b"}}, {}, "model.repo_id is required"),
        ({"model": {"repo_id": "a/b"}}, {}, "data.dataset is required"),
        ({"modle": {}}, {}, "did you mean 'model'"),
        (
            {
                **DEMO,
                "rounds": {"gpus_per_worker": 2, "parallel": "fsdp"},
                "optimizer": {"name": "adamw_8bit"},
            },
            {},
            "rounds.parallel: fsdp cannot be used with optimizer.name: adamw_8bit",
        ),
    ],
)
def test_mistakes_are_told(values, parameters, said):
    with pytest.raises(ConfigError, match=said):
        job(values, **parameters)


def test_sequences_must_fit_the_model(model_dir: Path):
    known = json.loads((model_dir / "config.json").read_text())["max_position_embeddings"]
    config = TrainConfig.parse({"model": {"repo_id": "a/b"}, "data": {"sequence_length": known}})
    check_length(model_dir, config)
    with pytest.raises(ConfigError, match=rf"{known:,} positions of a/b"):
        check_length(model_dir, config.replace(data={"sequence_length": known + 1}))


@pytest.fixture
def local_run(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setattr(datastore, "_active", ("local", str(tmp_path / ".metaflow")))
    monkeypatch.delenv("METAFLOW_RUNTIME_ENVIRONMENT", raising=False)
    return tmp_path


def prepared(local_run: Path, model_dir: Path, dataset_dir: Path, **sections) -> TrainingJob:
    raw = dataset_dir.parent / "raw.txt"
    values = {
        "model": {"repo_id": "a/tiny"},
        "data": {
            "dataset": str(raw),
            "heldout_samples": 20,
            "sequence_length": 32,
            "batch_size": 2,
            "samples_per_block": 40,
            "dataset_chunk_size": 20,
        },
        "optimizer": {"learning_rate": 3e-2},
        "rounds": {"claim_samples": 5, "seconds": 0.1, **sections.pop("rounds", {})},
        "evaluation": {"prompts": ["the value"], "max_new_tokens": 5},
        **sections,
    }
    return TrainingJob.configured(values, run="F-1").check_data().build()


def test_from_blocks_to_a_model_that_is_measured(local_run: Path, model_dir: Path, dataset_dir: Path):
    made = prepared(local_run, model_dir, dataset_dir)
    assert (local_run / ".metaflow" / "mf.hf" / made.training / "block_manifest.json").exists()
    plan = made.begin(model_dir, {"commit_hash": "c" * 40})
    assert (plan.samples, plan.claims, plan.claim_samples, plan.workers) == (80, 20, 5, 1)
    assert plan.heldout_samples == 20
    assert plan.rounds >= 1
    assert plan.seconds is not None
    assert "a/tiny @ cccccccccccc" in plan_text(plan)
    # Rows without the held-out ones, tokenized here: but for the first token of each sequence.
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    rows = (dataset_dir.parent / "raw.txt").read_text().splitlines()
    ranked = sorted(rows, key=key_of)
    held, trained_rows = ranked[:20], ranked[20:]
    exact = sum(len(ids) + 1 for ids in tokenizer(trained_rows)["input_ids"])
    assert exact * 30 / 32 < plan.tokens < exact
    assert plan.is_exact
    assert plan.rows == 100
    assert plan.format == "text"

    lines: list[str] = []
    metrics = made.work(model_dir, branch=0, write=lines.append)
    assert any("step 1" in line for line in lines)
    reference = made.export(model_dir, pathspec="F/1/merge/5")
    assert made.export(model_dir, pathspec="F/1/merge/6") == reference
    assert reference["metadata"]["positions_done"] == 20

    from metaflow_hf.store import configured_store
    from metaflow_hf.store.models import load_directory

    trained = load_directory(configured_store(), reference, local_run / "trained")
    outcome = made.evaluate(model_dir, trained, plan=plan, model=reference, metrics=[metrics], run="F/1")
    assert outcome.after.loss < outcome.before.loss
    assert outcome.seconds > 0
    assert [sample.name for sample in outcome.samples] == ["before", "after"]
    # The unigram model of the trained rows, on the held-out rows, by hand.
    end = tokenizer.eos_token_id
    seen, unseen = ([[*row, end] for row in tokenizer(texts)["input_ids"]] for texts in (trained_rows, held))
    expected = UnigramModel(seen, len(tokenizer)).loss(unseen)
    assert outcome.unigram.loss == pytest.approx(expected)
    assert outcome.unigram.tokens == outcome.after.tokens == sum(map(len, unseen))
    assert outcome.after.perplexity == pytest.approx(math.exp(outcome.after.loss))


def test_joining_takes_the_chunk_size_that_the_lineage_began_with(local_run, model_dir, dataset_dir):
    first = prepared(local_run, model_dir, dataset_dir)
    first.begin(model_dir, {})
    values = first.config.replace(data={"dataset_chunk_size": "auto"}).model_dump(mode="json")
    second = TrainingJob.configured(values, run="F-1").build()
    assert second.config.data.dataset_chunk_size == 20
    second.begin(model_dir, {})


def test_the_speed_is_measured_only_where_it_says_something(model_dir: Path, monkeypatch):
    config = TrainConfig.parse({"data": {"sequence_length": 32, "batch_size": 2}})
    state = torch.random.get_rng_state()
    assert tokens_per_second(model_dir, config, parameters=1_000) > 0
    assert torch.equal(torch.random.get_rng_state(), state)
    assert tokens_per_second(model_dir, config, parameters=10**10) is None
    monkeypatch.setenv("METAFLOW_RUNTIME_ENVIRONMENT", "kubernetes")
    assert tokens_per_second(model_dir, config, parameters=1_000) is None


def test_the_speed_is_that_of_the_dtype_that_the_run_computes_in(model_dir: Path, monkeypatch):
    """On a GPU fp32 is several times slower than bf16."""
    config = TrainConfig.parse(
        {"model": {"dtype": "bfloat16"}, "data": {"sequence_length": 32, "batch_size": 2}}
    )
    seen = []
    forward = torch.nn.Linear.forward

    def record(self, values):
        result = forward(self, values)
        seen.append(result.dtype)
        return result

    monkeypatch.setattr(torch.nn.Linear, "forward", record)
    assert tokens_per_second(model_dir, config, parameters=1_000) > 0
    assert set(seen) == {torch.bfloat16}


@pytest.mark.parametrize(
    ("visible", "branch", "workers", "seen"),
    [
        ("GPU-a,GPU-b", 1, 2, "GPU-b"),
        ("3,5,7", 4, 6, "5"),
        ("2", 0, 1, "2"),
    ],
)
def test_each_branch_sees_its_own_gpu(monkeypatch, visible, branch, workers, seen):
    monkeypatch.delenv("METAFLOW_RUNTIME_ENVIRONMENT", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    devices.take_share(branch, workers)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == seen


def test_a_worker_of_several_gpus_sees_its_own_and_no_more_than_it_has(monkeypatch):
    monkeypatch.delenv("METAFLOW_RUNTIME_ENVIRONMENT", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b,GPU-c,GPU-d")
    devices.take_share(1, 2, 2)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-c,GPU-d"
    devices.take_share(1, 2, 2)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-c,GPU-d"


@pytest.mark.parametrize(
    ("visible", "rounds", "said"),
    [
        (
            "0,1",
            {"workers": 3},
            r"3 workers need 3 GPUs, and this machine shows 2: .* Pass --num_gpus 2 \(0: all\)",
        ),
        (
            "0,1,2",
            {"workers": 2, "gpus_per_worker": 2},
            r"2 workers of 2 GPUs each .* need 4 GPUs, .* Pass --num_gpus 1 ",
        ),
        ("0,1", {"workers": 3, "share_gpus": True}, None),
        ("0,1", {"workers": 2}, None),
        ("", {"workers": 3}, None),
        # Two ways to hide all of them, and one to hide what follows.
        ("-1", {"workers": 3}, None),
        ("NoDevFiles", {"workers": 3}, None),
        ("0,-1,1", {"workers": 2}, "2 workers need 2 GPUs, and this machine shows 1"),
    ],
)
def test_more_workers_than_gpus_are_refused(monkeypatch, visible, rounds, said):
    monkeypatch.delenv("METAFLOW_RUNTIME_ENVIRONMENT", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    values = {**DEMO, "rounds": rounds}
    if said is None:
        job(values)
        return
    with pytest.raises(ConfigError, match=said):
        job(values)
    # Elsewhere each has a machine of its own.
    monkeypatch.setenv("METAFLOW_RUNTIME_ENVIRONMENT", "kubernetes")
    job(values)


def test_all_gpus_are_those_of_this_machine(monkeypatch):
    monkeypatch.delenv("METAFLOW_RUNTIME_ENVIRONMENT", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5,7")
    assert job(num_gpus=0).config.rounds.workers == 4
    assert job({**DEMO, "rounds": {"gpus_per_worker": 2}}, num_gpus=0).config.rounds.workers == 2
    monkeypatch.setenv("METAFLOW_RUNTIME_ENVIRONMENT", "kubernetes")
    with pytest.raises(ConfigError, match="give the number of branches"):
        job(num_gpus=0)


def test_a_pod_has_its_machine_for_itself(monkeypatch):
    monkeypatch.setenv("METAFLOW_RUNTIME_ENVIRONMENT", "kubernetes")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    devices.take_share(1, 8)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_branches_on_the_cpu_share_its_cores(monkeypatch):
    monkeypatch.delenv("METAFLOW_RUNTIME_ENVIRONMENT", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        devices.take_share(0, 64)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("gib", "samples"), [(8, 1_000), (16, 2_000), (32, 4_000), (64, 8_000), (512, 8_000)]
)
def test_chunks_suit_the_memory(gib: int, samples: int):
    assert chunk_samples(gib * 2**30) == samples


def with_evaluation(local_run: Path, rows: list[str], **evaluation) -> TrainingJob:
    (local_run / "train.txt").write_text("".join(f"{row}\n" for row in rows), "utf-8")
    (local_run / "test.txt").write_text("".join(f"held out {number}\n" for number in range(2_500)), "utf-8")
    values = {
        "model": {"repo_id": "a/tiny"},
        "data": {"dataset": f"{local_run}/train.txt", "evaluation_dataset": f"{local_run}/test.txt"},
        "evaluation": evaluation,
    }
    return TrainingJob.configured(values, run="F-1")


def measuring(rows: int) -> TrainConfig:
    return TrainConfig.parse({"evaluation": {"max_samples": rows}})


def test_an_evaluation_dataset_is_built_once_whatever_is_read_of_it(local_run: Path):
    few = with_evaluation(local_run, ["a row"], max_samples=10).build()
    stored = local_run / ".metaflow" / "mf.hf"
    # How much more than one block was written by then is a matter of time.
    assert few._open(few.heldout).manifest.total_samples in (1_000, 2_000, 2_500)
    with few._open(few.heldout) as blocks:
        assert [row.value for row in evaluation_rows(blocks, measuring(10))] == [
            f"held out {number}" for number in range(10)
        ]
    many = with_evaluation(local_run, ["a row"], max_samples=2_400).build()
    assert many.heldout == few.heldout
    assert len(list((stored / "datasets").iterdir())) == 2
    with many._open(many.heldout) as blocks:
        assert [row.value for row in evaluation_rows(blocks, measuring(2_400))] == [
            f"held out {number}" for number in range(2_400)
        ]
    everything = with_evaluation(local_run, ["a row"], max_samples=100_000).build()
    with everything._open(everything.heldout) as blocks:
        assert len(evaluation_rows(blocks, measuring(100_000))) == 2_500


def test_what_is_trained_is_no_evaluation_dataset(local_run: Path):
    job = with_evaluation(local_run, ["a row"])
    job.check_data()
    config = job.config.replace(data={"evaluation_dataset": job.config.data.dataset})
    with pytest.raises(ConfigError, match="nothing would be held out. Name another split"):
        replace(job, config=config).check_data()


def overlapping(local_run: Path, rows: list[str]) -> TrainingJob:
    """A job that measures "held out 0" to "held out 9" of its evaluation dataset, with its blocks."""
    made = with_evaluation(local_run, rows, max_samples=10)
    small = {"sequence_length": 32, "batch_size": 2, "dataset_chunk_size": 4}
    return replace(made, config=made.config.replace(data=small, rounds={"claim_samples": 2})).build()


def test_what_is_measured_is_not_trained_wherever_it_lies(local_run: Path, model_dir: Path, monkeypatch):
    monkeypatch.setattr("metaflow_hf.train.planning.tokens_per_second", lambda *_, **__: 1_000.0)
    rows = [f"row {number}" for number in range(12)]
    # The last one is of the evaluation dataset, but not measured.
    copies = ["held out 3", "held out 7", "held out 3", "held out 11"]
    made = overlapping(local_run, [*rows[:5], *copies, *rows[5:]])
    plan = made.begin(model_dir, {})
    assert (
        "3 rows of data.dataset are in data.evaluation_dataset too (of 16): held out, not trained."
        in plan.notes
    )
    assert plan.samples == 13
    metrics = made.work(model_dir, branch=0, write=lambda _: None)
    tokens = sum(event.tokens for event in merged_events([metrics]) if isinstance(event, ClaimDone))
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    # Of 8 claims one holds nothing else, and nothing predicts the first token of the others.
    assert tokens == sum(len(ids) + 1 for ids in tokenizer([*rows, "held out 11"])["input_ids"]) - 7
    # Whoever measures other rows would train others.
    other = replace(made, config=made.config.replace(evaluation={"max_samples": 12}))
    with pytest.raises(
        LineageMismatch, match="data.evaluation_rows: '10 texts, .*' in the lineage, '12 texts, "
    ):
        other.begin(model_dir, {})


def test_where_all_is_measured_nothing_is_begun(local_run: Path, model_dir: Path):
    made = overlapping(local_run, ["held out 1", "held out 2", "held out 1"])
    with pytest.raises(ConfigError, match=r"holds all 3 rows of .*nothing is left to train on"):
        made.begin(model_dir, {})
    assert not (local_run / ".metaflow/mf.hf/training").exists()


def test_copies_are_counted_in_the_beginning_of_a_large_dataset(tmp_path: Path, monkeypatch):
    config = TrainConfig.parse({"evaluation": {"max_samples": 5}})

    def turns(number: int) -> dict[str, object]:
        return {"messages": [{"role": "user", "content": f"question {number}"}]}

    for name, numbers in (("train", range(1_500)), ("test", (7, 1_200, 2_000))):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(turns(n)) + "\n" for n in numbers))
        build_blocks(tmp_path / f"{name}.jsonl", tmp_path / name)
    with BlockManager(tmp_path / "train") as blocks, BlockManager(tmp_path / "test") as heldout:
        assert count_copies(blocks, None, config).notes() == []
        assert count_copies(blocks, heldout, config) == Copies(2, 1_500, 1_500)
        monkeypatch.setattr("metaflow_hf.train.heldout.COUNTED_BYTES", 1)
        found = count_copies(blocks, heldout, config, samples=10**6)
    assert found == Copies(1, 1_000, 10**6)
    assert found.notes() == [
        "1 row of data.dataset is in data.evaluation_dataset too (of the first 1,000 of 1,000,000): held out, not trained."
    ]
