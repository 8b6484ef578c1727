"""What may join a lineage and what may not."""

import dataclasses
import json
import shutil
import threading

import msgspec
import pytest

from metaflow_hf.data import BlockManager
from metaflow_hf.data.order import ClaimOrder
from metaflow_hf.errors import (
    ConfigError,
    LineageMismatch,
    TrainingIncomplete,
    UnsupportedModelError,
    UnsupportedStore,
)
from metaflow_hf.events import ClaimDone
from metaflow_hf.store import datastore
from metaflow_hf.store.objects import CreateResult
from metaflow_hf.train import heldout, running, start_lineage
from metaflow_hf.train.encoding import example_encoder, rows_of_step, training_tokenizer
from metaflow_hf.train.heldout import HeldOut, held_out, heldout_rows, heldout_target, training_samples
from metaflow_hf.train.job import TrainingJob
from metaflow_hf.train.lineage import Lineage
from metaflow_hf.train.pinning import pinned, sources_of
from metaflow_hf.train.spec import claim_samples
from metaflow_hf.train.survey import Surveyor


def test_another_configuration_is_refused_with_every_difference(training):
    training.start()
    training.config = training.config.replace(
        optimizer={"learning_rate": 0.5}, data={"sequence_length": 64}, rounds={"max_tokens": 5000}
    )
    with pytest.raises(LineageMismatch) as error:
        training.work()
    message = str(error.value)
    assert "optimizer.learning_rate: 0.01 in the lineage, 0.5 here" in message
    assert "data.sequence_length: 32 in the lineage, 64 here" in message
    assert "rounds.max_tokens: None in the lineage, 5000 here" in message
    assert "weight_decay" not in message
    with pytest.raises(LineageMismatch):
        training.start()


def test_another_dataset_is_refused(training, tmp_path):
    from metaflow_hf.data import process_raw_dataset_to_blocks

    training.start()
    (tmp_path / "other.txt").write_text("one line\n" * 100, "utf-8")
    process_raw_dataset_to_blocks(tmp_path / "other.txt", tmp_path / "other", "words", block_size=40)
    training.dataset_dir = tmp_path / "other"
    with pytest.raises(LineageMismatch, match=r"dataset\.digest"):
        training.work()


def test_what_does_not_change_the_mathematics_may_differ(training):
    training.start()
    training.start(
        rounds={"workers": 4, "seconds": 5.0, "keep": "recent", "max_failures": 2, "claim_samples": "auto"},
        report={"interval_seconds": 1.0},
    )
    training.work()
    assert Lineage(training.store).newest().manifest.final


def test_a_model_that_cannot_keep_documents_apart_begins_nothing(training, monkeypatch):
    def refuse(model):
        raise UnsupportedModelError("it lets packed documents see each other")

    monkeypatch.setattr(running, "require_isolation", refuse)
    with pytest.raises(UnsupportedModelError, match="see each other"):
        training.start(data={"packing": "isolated"})
    assert not [name for name in ("weights", "rounds") if training.store.children(name)]
    training.start(data={"packing": True})


def test_starting_is_idempotent_and_safe_by_many(training):
    specs = []
    threads = [threading.Thread(target=lambda: specs.append(training.start())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lineage = Lineage(training.store)
    assert len(specs) == 4
    assert all(spec == lineage.spec() for spec in specs)
    assert lineage.newest().number == 0
    assert lineage.round(0).manifest.weights == lineage.spec().initial_weights


def test_auto_gives_each_worker_claims_enough_and_divides_the_chunk(training):
    spec = training.start(rounds={"claim_samples": "auto"}, data={"epochs": 20})
    # Of ten rows a step would not be full.
    assert spec.order["claim_samples"] == 20
    assert spec.num_positions == 100


def test_a_claim_that_does_not_divide_a_chunk_is_refused(training):
    with pytest.raises(ConfigError, match=r"claim_samples = 7 does not divide .* nearest that does is 5"):
        training.start(rounds={"claim_samples": 7})


def test_surplus_rows_are_not_in_the_order(training):
    config = training.config.replace(data={"evaluation_dataset": None})
    assert training_samples([40, 40, 20], config) == [40, 40, 20]
    assert training_samples([40, 40, 20], config.replace(data={"max_samples": 60})) == [40, 20, 0]
    with pytest.raises(ConfigError, match="nothing is left"):
        training_samples([5], config)


def test_how_much_is_held_out(training):
    config = training.config.replace(data={"evaluation_dataset": None, "heldout_samples": 10})
    assert heldout_target(100, config) == 10
    assert heldout_target(10**6, config) == 1_000
    automatic = config.replace(data={"heldout_samples": "auto"})
    assert [heldout_target(rows, automatic) for rows in (2, 19, 100, 10_000, 10**6)] == [1, 1, 10, 256, 1_000]
    with pytest.raises(ConfigError, match=r"20 samples .*heldout_samples = 20"):
        heldout_target(100, config.replace(data={"max_samples": 20, "heldout_samples": 20}))
    sides = HeldOut(2**62)
    held = sum(sides.holds(f"text {number}") for number in range(4_000))
    assert 900 < held < 1_100


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("different", [2, 3, 7, 40])
def test_of_any_two_different_texts_one_is_trained_and_one_measured(training, tmp_path, different, copies):
    config = training.config.replace(data={"evaluation_dataset": None, "heldout_samples": "auto"})
    for seed in range(12):
        rows = [{"text": f"{seed}: text {number}"} for number in range(different)] * copies
        (tmp_path / f"{seed}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        with BlockManager(tmp_path / f"{seed}.jsonl", 5, cache_dir=tmp_path / "cache") as blocks:
            sides = held_out(blocks, None, config)
            held = {row["text"] for row in rows if sides.holds(row["text"])}
            wanted = max(different * copies // 10, 1)
            assert len(held) == min(different - 1, -(-wanted // copies))
            assert {row.value for row in heldout_rows(blocks, config)} == held


def test_in_many_rows_of_few_texts_some_text_is_held_out(training, tmp_path, monkeypatch):
    monkeypatch.setattr(heldout, "SETTLED_ROWS", 10)
    config = training.config.replace(data={"evaluation_dataset": None, "heldout_samples": 1})
    for seed in range(6):
        rows = [{"text": f"{seed}: text {number % 2}"} for number in range(200)]
        (tmp_path / f"{seed}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        with BlockManager(tmp_path / f"{seed}.jsonl", 50, cache_dir=tmp_path / "cache") as blocks:
            sides = held_out(blocks, None, config)
            assert len({row["text"] for row in rows if sides.holds(row["text"])}) == 1


def test_rows_that_all_say_the_same_are_refused(training, tmp_path):
    config = training.config.replace(data={"evaluation_dataset": None, "heldout_samples": "auto"})
    (tmp_path / "raw.jsonl").write_text('{"text": "same"}\n' * 5)
    with (
        BlockManager(tmp_path / "raw.jsonl", cache_dir=tmp_path / "cache") as blocks,
        pytest.raises(ConfigError, match="hold 1 different text, .*evaluation_dataset"),
    ):
        held_out(blocks, None, config)


def test_a_lineage_that_was_never_started_is_named(training):
    with pytest.raises(TrainingIncomplete, match="there is no lineage at"):
        training.work()


@pytest.mark.parametrize("changed", ["tokenizer.json", "model.safetensors"])
def test_another_tokenizer_or_other_frozen_weights_are_refused(training, tmp_path, changed):
    lora = {"lora": {"rank": 2}} if changed == "model.safetensors" else {}
    training.start(model=lora)
    other = tmp_path / "other"
    shutil.copytree(training.model_dir, other)
    content = (other / changed).read_bytes()
    # The last byte of a value, so that both stay readable.
    (other / changed).write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if lora else content + b"\n")
    training.model_dir = other
    with pytest.raises(LineageMismatch, match=r"model\.(tokenizer|base)"):
        training.work()


def test_a_later_start_takes_what_auto_was_resolved_to(training):
    first = training.start(rounds={"claim_samples": 4})
    training.config = training.config.replace(rounds={"claim_samples": "auto", "workers": 64})
    assert training.start() == first


HASH, OTHER = "a" * 40, "b" * 40


@pytest.mark.parametrize(
    ("model", "dataset", "pinned_model", "pinned_dataset"),
    [
        (("org/m", "main"), "hf://org/d:en:train", HASH, f"hf://org/d:en:train@{OTHER}"),
        (("org/m", "v1"), "hf://org/d:en:train@main", HASH, f"hf://org/d:en:train@{OTHER}"),
        (("org/m", OTHER), f"hf://org/d:en:train@{HASH}", OTHER, f"hf://org/d:en:train@{HASH}"),
        (("org/n", "main"), "hf://org/d:de:train", "main", "hf://org/d:de:train"),
        (("org/m", "main"), "datasets/rows-01", HASH, "datasets/rows-01"),
    ],
)
def test_branches_are_what_they_were_when_the_lineage_began(
    training, model, dataset, pinned_model, pinned_dataset
):
    spec = training.start()
    begun = training.config.replace(
        model={"repo_id": "org/m"}, data={"dataset": "hf://org/d:en:train@some-branch"}
    )
    sources = sources_of(begun, base_model={"commit_hash": HASH}, dataset_commit=OTHER)
    later = training.config.replace(
        model={"repo_id": model[0], "revision": model[1]}, data={"dataset": dataset}
    )
    found = pinned(later, msgspec.structs.replace(spec, sources=sources))
    assert (found.model.revision, found.data.dataset) == (pinned_model, pinned_dataset)
    assert pinned(later, msgspec.structs.replace(spec, sources={})) == later


@pytest.mark.parametrize("commit", [OTHER, None])
def test_what_is_measured_stays_what_it_was_when_the_lineage_began(training, commit):
    spec = training.start()
    config = training.config.replace(data={"dataset": "rows.txt", "evaluation_dataset": "hf://org/d:en:test"})
    sources = sources_of(config, base_model={}, dataset_commit=None, evaluation_commit=commit)
    found = pinned(config, msgspec.structs.replace(spec, sources=sources))
    kept = "hf://org/d:en:test" + (f"@{commit}" if commit else "")
    assert (found.data.dataset, found.data.evaluation_dataset) == ("rows.txt", kept)


def test_a_lineage_keeps_the_commits_that_it_began_with(training, tmp_path, monkeypatch):
    job = TrainingJob(
        config=training.config.replace(
            model={"repo_id": "org/m"}, data={"dataset": "hf://org/d", "evaluation_dataset": None}
        ),
        lineage="mine",
    )
    monkeypatch.setattr(datastore, "_active", ("local", str(tmp_path / "datastore")))
    assert job.pinned() == job, "nothing was started"
    with training.blocks() as blocks:
        for commit in (HASH, OTHER):
            spec = start_lineage(
                store=datastore.configured_store().child("training/mine"),
                blocks=blocks,
                model_dir=training.model_dir,
                config=job.config,
                lineage="mine",
                base_model={"commit_hash": commit},
            )
            assert spec.sources == {"model": "org/m", "model_commit": HASH, "dataset": "hf://org/d"}
    assert job.pinned().config.model.revision == HASH


def test_a_store_that_does_not_create_atomically_trains_nothing(training, monkeypatch):
    def overwrite(key, data):
        training.store.put(key, data)
        return CreateResult(created=True, content=data)

    monkeypatch.setattr(training.store, "create", overwrite)
    with pytest.raises(UnsupportedStore, match="does not support atomic creation"):
        training.start()
    assert not training.store.children("weights")


def test_another_run_joins_while_the_lineage_is_trained(training):
    """As another run does that is given the lineage's name: it starts, in its own words, and works along."""
    started = []

    def join_once(event):
        if isinstance(event, ClaimDone) and not started:
            started.append(threading.Thread(target=errors_of, args=(join,)))
            started[0].start()

    errors = []

    def errors_of(what):
        try:
            what()
        except BaseException as error:
            errors.append(error)

    def join():
        guest = dataclasses.replace(training, config=training.config.replace(rounds={"workers": 5}))
        spec = guest.start(rounds={"claim_samples": "auto"})
        assert spec == Lineage(training.store).spec()
        guest.work(attempt="b" * 16)

    training.start(rounds={"seconds": 0.05}, data={"epochs": 3})
    training.work(attempt="a" * 16, on_event=join_once)
    started[0].join(60)
    assert errors == []
    assert Lineage(training.store).newest().manifest.final


def test_a_final_lineage_is_left_at_once_by_whoever_resumes(training):
    training.start()
    training.work()
    before = [(info.key, info.last_modified) for info in training.store.list("rounds")]
    told = []
    assert training.start() == Lineage(training.store).spec()
    training.work(on_event=told.append)
    (notice,) = told
    assert "is final since round" in notice.message
    assert [(info.key, info.last_modified) for info in training.store.list("rounds")] == before


@pytest.mark.parametrize("rows", [100, 400, 1_000, 5_000, 100_000])
@pytest.mark.parametrize("step_rows", [1, 3, 8, 34, 100])
@pytest.mark.parametrize("workers", [1, 4])
def test_claims_fill_steps_where_the_data_allow_it(training, rows, step_rows, workers):
    config = training.config.replace(rounds={"claim_samples": "auto", "workers": workers}, data={"epochs": 1})
    size = claim_samples(config, 1_000, rows, step_rows=step_rows)
    assert 1_000 % size == 0
    finest = max(
        one for one in range(1, 1_001) if 1_000 % one == 0 and one <= max(rows // (160 * workers), 1)
    )
    assert finest <= size <= max(rows // (4 * workers), finest)
    steps = size / step_rows
    # Full steps, unless too few claims would be left.
    assert steps / -(-steps // 1) > 0.65 or rows // (4 * workers) < 3 * step_rows


def test_a_default_configuration_reaches_its_batch_size_on_few_rows(training, tmp_path):
    rows = [{"text": f"the value number {number} of a list"} for number in range(400)]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = training.config.replace(
        rounds={"claim_samples": "auto", "workers": 1},
        data={"evaluation_dataset": None, "sequence_length": 64, "batch_size": 8, "packing": True},
    )
    with BlockManager(tmp_path / "few.jsonl", cache_dir=tmp_path / "cache") as blocks:
        blocks.wait_complete()
        encoder = example_encoder(training_tokenizer(training.model_dir, config), blocks.format, config)
        size = claim_samples(config, 1_000, 400, step_rows=rows_of_step(blocks, encoder, config))
        order = ClaimOrder([400], 1_000, size)
        limits = {"held_out": held_out(blocks, None, config), "max_positions": None, "max_tokens": None}
        found = Surveyor(blocks, encoder, config, **limits).survey(order)
    assert found.sequences_per_step > 0.8 * 8
