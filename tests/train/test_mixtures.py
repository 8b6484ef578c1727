"""A mixture of datasets: what is held out, planned, trained and reported of each."""

import copy
import json
import threading
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file
from stand_ins import stories as sentences
from transformers.utils.logging import enable_progress_bar

from metaflow_hf.config import TrainConfig
from metaflow_hf.data import BlockManager, build_blocks
from metaflow_hf.data.mixture import MixedBlocks, MixedPart
from metaflow_hf.errors import BadRowError, ConfigError, LineageMismatch
from metaflow_hf.events import ClaimDone, RoundClosed, StepDone
from metaflow_hf.report import plan_text, summary_text, training_page
from metaflow_hf.store import configured_store, datastore
from metaflow_hf.store.models import load_directory
from metaflow_hf.train import heldout
from metaflow_hf.train.heldout import held_out, heldout_rows
from metaflow_hf.train.job import TrainingJob, merged_events
from metaflow_hf.train.lineage import Lineage
from metaflow_hf.train.pinning import pinned
from metaflow_hf.train.publishing import card_facts
from metaflow_hf.train.results import find_results
from metaflow_hf.train.sides import Texts, hold_out_of_each, key_of
from metaflow_hf.train.status import lineage_status, stored_order

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(autouse=True)
def _local_run(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(datastore, "_active", ("local", str(tmp_path / ".metaflow")))
    monkeypatch.delenv("METAFLOW_RUNTIME_ENVIRONMENT", raising=False)
    # How fast this machine is does not matter here.
    monkeypatch.setattr("metaflow_hf.train.planning.tokens_per_second", lambda *_, **__: 1000.0)
    yield
    enable_progress_bar()


def write(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def sources(tmp_path: Path) -> list[str]:
    """100 instructions, 40 conversations and 60 texts."""
    return [
        write(
            tmp_path / "tasks.jsonl",
            ({"instruction": f"say {text[:9]}", "input": "", "output": text} for text in sentences(11, 100)),
        ),
        write(
            tmp_path / "talks.jsonl",
            (
                {
                    "messages": [
                        {"role": "user", "content": text[:9]},
                        {"role": "assistant", "content": text},
                    ]
                }
                for text in sentences(12, 40)
            ),
        ),
        write(tmp_path / "plain.jsonl", ({"text": text} for text in sentences(13, 60))),
    ]


def values_of(sources: list[str], settings=({}, {}, {}), **sections) -> dict:
    datasets = [
        {"dataset": source, "name": Path(source).stem, **extra}
        for source, extra in zip(sources, settings, strict=True)
    ]
    values = {
        "model": {"repo_id": "a/tiny"},
        "data": {
            "datasets": datasets,
            "heldout_samples": 20,
            "sequence_length": 64,
            "batch_size": 2,
            "samples_per_block": 25,
            "dataset_chunk_size": 10,
            "chat_template": TEMPLATE,
        },
        "optimizer": {"learning_rate": 1e-2},
        "rounds": {"claim_samples": 5, "seconds": 0.1, "keep": "all"},
    }
    for section, changes in sections.items():
        values[section] = {**values.get(section, {}), **changes}
    return values


def prepared(values: dict, run: str = "F-1") -> TrainingJob:
    job = TrainingJob.configured(values, run=run).check_data().build()
    # As between the steps of a flow.
    return TrainingJob.from_json(json.loads(json.dumps(job.to_json())))


def mixture_of(job: TrainingJob) -> MixedBlocks:
    blocks = job._open_training()
    assert isinstance(blocks, MixedBlocks)
    return blocks


def in_memory(texts: list[list[str]]) -> list[Texts]:
    return [
        Texts(str(number), len(some), lambda some=some: map(key_of, some))
        for number, some in enumerate(texts)
    ]


def test_a_mixture_reads_the_rows_of_all_datasets(sources):
    with mixture_of(prepared(values_of(sources))) as blocks:
        assert [blocks.blocks_of(part) for part in range(3)] == [range(4), range(4, 6), range(6, 9)]
        assert blocks.manifest.total_samples == 200
        assert [block.start_index for block in blocks.manifest.blocks] == [
            0,
            25,
            50,
            75,
            100,
            125,
            140,
            165,
            190,
        ]
        assert [form.name for form in blocks.format.parts] == ["alpaca", "messages", "text"]
        values = [blocks.format.example(blocks.read_rows(block, 1, 2)[0]) for block in (0, 4, 6)]
        assert [type(value).__name__ for value in values] == ["Instruction", "Conversation", "str"]
        assert values[2] == sentences(13, 60)[1]
        assert blocks.name_block(5) == "talks, block 1"
        for place in ((9, 0, 1), (-1, 0, 1), (5, 10, 16)):
            with pytest.raises(IndexError):
                blocks.read_rows(*place)


def test_only_the_first_rows_of_blocks_that_are_there_are_used(sources, tmp_path):
    build_blocks(sources[0], tmp_path / "built", samples_per_block=25)
    with MixedBlocks(
        [MixedPart(name="a", blocks=BlockManager(tmp_path / "built", enable_prefetch=False), max_samples=30)]
    ) as blocks:
        assert [block.sample_count for block in blocks.manifest.blocks] == [25, 5]
        with pytest.raises(IndexError):
            blocks.read_rows(1, 0, 6)


def test_some_texts_of_every_dataset_are_on_both_sides(sources):
    job = prepared(values_of(sources))
    with mixture_of(job) as blocks:
        sides = held_out(blocks, None, job.config)
        counts = []
        for part in range(3):
            rows = [
                row
                for block in blocks.blocks_of(part)
                for row in blocks.read_rows(block, 0, blocks.manifest.blocks[block].sample_count)
            ]
            counts.append(sum(sides.holds(blocks.format.example(row)) for row in rows))
        # A tenth of each.
        assert counts == [10, 4, 6]
        measured = heldout_rows(blocks, job.config)
        assert {row.dataset for row in measured} == {"tasks", "talks", "plain"}
        assert all(sides.holds(row.value) for row in measured)
        assert {str(row).partition(",")[0] for row in measured} == {"tasks", "talks", "plain"}
        with mixture_of(job) as again:
            assert held_out(again, None, job.config) == sides
    few = job.config.replace(evaluation={"max_samples": 12})
    with mixture_of(job) as blocks:
        names = [row.dataset for row in heldout_rows(blocks, few)]
    assert len(names) <= 12
    assert set(names) == {"tasks", "talks", "plain"}


@pytest.mark.parametrize("settled_rows", [20_000, 50])
def test_a_small_dataset_keeps_half_of_its_texts(settled_rows):
    texts = sentences(3, 3_000)
    for seed in range(20):
        small = [sentences(1000 + seed, 5), [f"one {seed}", f"two {seed}"], [f"only {seed}"] * 7]
        sides = hold_out_of_each(in_memory([texts, *small]), 0.2, settled_rows=settled_rows)
        assert sum(map(sides.holds, texts)) == pytest.approx(600, abs=80)
        assert [sum(map(sides.holds, some)) for some in small] == [1, 1, 0]


def test_a_large_dataset_of_which_little_is_used_does_not_take_the_place_of_the_others(sources):
    write(Path(sources[2]), ({"text": text} for text in sentences(13, 2_000)))
    job = prepared(values_of(sources, ({"weight": 2}, {"weight": 1}, {"weight": 1})))
    with mixture_of(job) as blocks:
        names = [row.dataset for row in heldout_rows(blocks, job.config)]
    # 20 of the 160 rows that are trained are held out, of the third dataset as large a part: not all are measured.
    assert [names.count(name) for name in ("tasks", "talks", "plain")] == [12, 5, 69]


def test_texts_that_several_datasets_hold_are_on_one_side():
    for seed in range(20):
        texts = sentences(seed, 40)
        sides = hold_out_of_each(in_memory([texts, texts[:10], texts[5:15]]), 0.2, settled_rows=20_000)
        for some in (texts, texts[:10], texts[5:15]):
            assert 0 < sum(map(sides.holds, some)) < len(some)
    with pytest.raises(ConfigError, match="no dataset of data.datasets holds two different texts"):
        hold_out_of_each(in_memory([["a", "a"], ["b"]]), 0.3, settled_rows=20_000)


def test_many_copies_of_few_texts_in_a_large_dataset(monkeypatch, sources):
    monkeypatch.setattr(heldout, "SETTLED_ROWS", 10)
    write(Path(sources[2]), ({"text": text} for text in ["one text", "another text"] * 30))
    job = prepared(values_of(sources))
    with mixture_of(job) as blocks:
        sides = held_out(blocks, None, job.config)
        assert sides.holds("one text") != sides.holds("another text")


def test_the_plan_counts_every_dataset(sources, model_dir):
    plan = prepared(values_of(sources, ({}, {"epochs": 2}, {"max_samples": 50}))).begin(model_dir, {})
    assert [(one["name"], one["rows"]) for one in plan.datasets] == [
        ("tasks", 89),
        ("talks", 72),
        ("plain", 45),
    ]
    assert [one["share"] for one in plan.datasets] == [100 / 230, 80 / 230, 50 / 230]
    assert plan.is_exact
    assert sum(one["tokens"] for one in plan.datasets) == plan.tokens
    assert plan.samples == 89 + 72 + 45
    assert plan.dataset == "tasks, talks, plain"
    assert not [note for note in plan.notes if "run out" in note]


def test_the_plan_of_weights_says_what_runs_out(sources, model_dir):
    settings = ({"weight": 1}, {"weight": 1, "epochs": 2}, {"weight": 2})
    plan = prepared(values_of(sources, settings)).begin(model_dir, {})
    assert [one["share"] for one in plan.datasets] == pytest.approx([0.25, 0.25, 0.5], abs=0.02)
    assert not plan.is_exact
    (note,) = [note for note in plan.notes if "run out" in note]
    assert "plain has run out (its 60 rows), when 30 % of tasks and 75 % of talks are trained" in note
    assert note in " ".join(plan_text(plan).replace("\n", " ").split())


def test_the_plan_says_that_a_weight_is_too_small(sources, model_dir):
    settings = ({"weight": 1000}, {"weight": 1}, {"weight": 1000})
    plan = prepared(values_of(sources, settings)).begin(model_dir, {})
    assert plan.datasets[1]["rows"] == 0
    assert any(note.startswith("no row of talks is trained: its weight") for note in plan.notes)


def test_the_specification_describes_the_mixture(sources, model_dir):
    values = values_of(sources, ({"weight": 1}, {"weight": 1, "epochs": 2}, {"weight": 2}))
    job = prepared(values)
    job.begin(model_dir, {})
    spec = Lineage(job._lineage_store()).spec()
    assert [
        (one["blocks"], one["samples"], one["epochs"], one["weight"]) for one in spec.order["datasets"]
    ] == [
        (4, 100, 1, 1.0),
        (2, 40, 2, 1.0),
        (3, 60, 1, 2.0),
    ]
    assert spec.order["epochs"] == 1
    assert spec.order["num_samples"] == sum(one["rows"] for one in spec.order["datasets"])
    assert [one["name"] for one in spec.datasets] == ["tasks", "talks", "plain"]
    assert [one["format"] for one in spec.hyperparameters["data"]["datasets"]] == [
        "alpaca",
        "messages",
        "text",
    ]
    # Other names are the same mathematics, other weights are not.
    renamed = [{**one, "name": f"my {one['name']}"} for one in values["data"]["datasets"]]
    prepared({**values, "data": {**values["data"], "datasets": renamed}}).begin(model_dir, {})
    other = [{**one, "weight": 1} for one in values["data"]["datasets"]]
    with pytest.raises(LineageMismatch, match="order"):
        prepared({**values, "data": {**values["data"], "datasets": other}}).begin(model_dir, {})


def test_one_dataset_keeps_its_specification(training):
    spec = json.loads(training.start().encode())
    assert "datasets" not in spec
    assert "datasets" not in spec["order"]
    assert "datasets" not in spec["hyperparameters"]["data"]


def test_a_job_of_an_earlier_version_still_loads(sources):
    stored = prepared(values_of(sources)).to_json()
    del stored["parts"]
    del stored["config"]["data"]["datasets"]
    stored["config"]["data"]["dataset"] = sources[0]
    assert TrainingJob.from_json(stored).parts == ()


def test_datasets_that_are_built_are_used_again(sources):
    first = prepared(values_of(sources))
    alone = values_of(sources)
    alone["data"] = {**alone["data"], "dataset": sources[2], "datasets": []}
    assert prepared(alone).training == first.parts[2]
    keys = list(first.parts)
    again = prepared(values_of(keys, ({"max_samples": 30, "name": "a"}, {"name": "b"}, {"name": "c"})))
    assert again.parts == first.parts
    with mixture_of(again) as blocks:
        assert blocks.manifest.total_samples == 30 + 40 + 60


def test_a_whole_training_learns_every_dataset(sources, model_dir, tmp_path):
    values = values_of(
        sources,
        ({}, {"epochs": 2}, {}),
        data={"epochs": 3},
        evaluation={"prompts": ["the"], "max_new_tokens": 3, "every_rounds": 5},
    )
    job = prepared(values)
    plan = job.begin(model_dir, {"commit_hash": "c" * 40})
    metrics = job.work(model_dir, branch=0, write=lambda _: None)
    model = job.export(model_dir, pathspec="F/1/merge/5")
    trained = model["metadata"]["datasets"]
    order = job._mixed_order()
    counted = [0, 0, 0]
    for event in merged_events([metrics]):
        if isinstance(event, ClaimDone):
            counted[order.part_of(event.position)] += event.tokens
    assert [one["tokens"] for one in trained] == counted
    assert [one["tokens"] for one in plan.datasets] == pytest.approx(counted, rel=0.01)
    assert sum(one["tokens"] for one in plan.datasets) == plan.tokens
    assert sum(counted) == model["metadata"]["tokens"]
    assert [one["rows"] for one in trained] == [300, 80, 180]
    directory = load_directory(configured_store(), model, tmp_path / "trained")
    outcome = job.evaluate(model_dir, directory, plan=plan, model=model, metrics=[metrics], run="F/1")
    assert [one.name for one in outcome.datasets] == ["tasks", "talks", "plain"]
    for one in outcome.datasets:
        assert one.loss_after < one.loss_before - 0.3
    total = sum(one.measured_tokens for one in outcome.datasets)
    assert total == outcome.after.tokens
    mean = sum(one.loss_after * one.measured_tokens for one in outcome.datasets) / total
    assert mean == pytest.approx(outcome.after.loss, abs=1e-6)
    assert all(row.place.split(",")[0] in ("tasks", "talks", "plain") for row in outcome.worst)
    assert "  talks  " in summary_text(outcome)
    assert "Datasets" in str(training_page(plan, merged_events([metrics]), outcome))
    facts = card_facts(configured_store(), model, "me/mine", find_results(configured_store(), model))
    assert [one.name for one in facts.datasets] == ["tasks", "talks", "plain"]
    assert facts.datasets[1].loss_after == outcome.datasets[1].loss_after
    found = lineage_status(
        Lineage(job._lineage_store()),
        name="F-1",
        find_order=lambda spec: stored_order(configured_store(), spec),
        watch_seconds=0.0,
    )
    assert found.chunks_done == found.chunks_total == 3 * 12 + 2 * 5 + 3 * 7


def test_tokens_of_claims_whose_metrics_are_lost_are_shared_out(sources, model_dir):
    job = prepared(values_of(sources))
    job.begin(model_dir, {})
    job.work(model_dir, branch=0, write=lambda _: None)
    store = job._lineage_store()
    for info in list(store.list("metrics")):
        store.delete(info.key)
    metadata = job.export(model_dir, pathspec="F/1/merge/5")["metadata"]
    assert sum(one["tokens"] for one in metadata["datasets"]) == metadata["tokens"]
    assert [one["share"] for one in metadata["datasets"]] == [0.5, 0.2, 0.3]


def test_an_evaluation_dataset_is_measured_instead(sources, model_dir, tmp_path):
    other = write(tmp_path / "other.jsonl", ({"prose": text} for text in sentences(13, 65)[55:]))
    data = {"evaluation_dataset": other, "text_column": "prose"}
    job = prepared(values_of(sources, data=data))
    plan = job.begin(model_dir, {})
    # The five rows that are in both are not trained.
    assert [one["rows"] for one in plan.datasets] == [100, 40, 55]
    assert any(
        note.startswith("5 rows of data.datasets are in data.evaluation_dataset") for note in plan.notes
    )
    assert plan.heldout_samples == 10
    assert job.heldout_texts() == sentences(13, 65)[55:]


def test_a_row_that_cannot_be_used_is_named_with_its_dataset(sources, model_dir):
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "judge", "content": 5}]}
        for text in "abcdef"
    ]
    write(Path(sources[1]), rows)
    values = values_of(sources)
    with pytest.raises((BadRowError, ConfigError), match=r"data\.datasets\[1\] \(talks\)"):
        prepared(values).begin(model_dir, {})


@pytest.mark.parametrize("number", [0, 2])
def test_an_equal_dataset_is_refused(sources, number):
    values = values_of([*sources[:2], sources[number]] if number == 0 else sources)
    if number == 0:
        values["data"]["datasets"][2]["dataset"] = f"{Path(sources[0]).parent}/./tasks.jsonl"
        values["data"]["datasets"][2]["name"] = "again"
        said = r"data\.datasets\[2\]: .* is the same dataset as data\.datasets\[0\]"
    else:
        values["data"]["evaluation_dataset"] = sources[2]
        said = r"data\.evaluation_dataset: .* is what data\.datasets\[2\]"
    with pytest.raises(ConfigError, match=said):
        prepared(values)


def test_a_started_mixture_stays_with_its_commits(sources, model_dir):
    job = prepared(values_of(sources))
    job.begin(model_dir, {})
    spec = Lineage(job._lineage_store()).spec()
    known = [{"name": "x", "dataset": "hf://a/b:en", "commit": "c" * 40, "key": "k", "digest": "d"}]
    config = TrainConfig.parse(
        {"data": {"datasets": [{"dataset": "hf://a/b:en@main"}, {"dataset": f"hf://c/d@{'e' * 40}"}]}}
    )
    fixed = pinned(config, replace(spec, datasets=known)).data.datasets
    assert [one.dataset for one in fixed] == [f"hf://a/b:en@{'c' * 40}", f"hf://c/d@{'e' * 40}"]


@pytest.fixture
def mixed(training, sources, tmp_path):
    """A lineage of a mixture without held-out rows, on a store of its own."""
    settings = ({"weight": 2}, {"weight": 1, "epochs": 2}, {"weight": 1})
    data = values_of(sources, settings)["data"]
    keep = ("datasets", "dataset_chunk_size", "sequence_length", "batch_size", "chat_template")
    training.config = training.config.replace(data={name: data[name] for name in keep})
    for source in sources:
        build_blocks(source, tmp_path / "parts" / Path(source).stem, samples_per_block=25)

    def blocks() -> MixedBlocks:
        return MixedBlocks(
            [
                MixedPart(
                    name=Path(source).stem,
                    blocks=BlockManager(tmp_path / "parts" / Path(source).stem, dataset_chunk_size=10),
                )
                for source in sources
            ]
        )

    training.blocks = blocks
    return training


def weights_of(store, tmp_path: Path):
    newest = Lineage(store).newest().manifest
    assert newest.final
    store.download(newest.weights.key, tmp_path / "final.safetensors")
    return load_file(tmp_path / "final.safetensors")


def with_store(training, name: str):
    changed = copy.copy(training)
    changed.store = training.store.child(name)
    return changed


@pytest.mark.parametrize("rounds", [1, 3])
def test_a_killed_worker_of_a_mixture_resumes_bit_for_bit(mixed, tmp_path, rounds):
    class Killed(BaseException):
        pass

    def die(event):
        if isinstance(event, RoundClosed):
            die.closed += 1
        if isinstance(event, StepDone) and die.closed == rounds and event.step % 2 == 0:
            raise Killed

    die.closed = 0
    whole, parts = with_store(mixed, "whole"), with_store(mixed, "parts")
    for one in (whole, parts):
        one.start(rounds={"seconds": 0.01})
    whole.work()
    with pytest.raises(Killed):
        parts.work(on_event=die)
    before = Lineage(parts.store).newest()
    assert (before.number, before.manifest.final) == (rounds, False)
    parts.work()
    expected, found = weights_of(whole.store, tmp_path), weights_of(parts.store, tmp_path)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_two_workers_train_every_claim_of_a_mixture_once(mixed):
    spec = mixed.start(rounds={"workers": 2, "seconds": 0.1})
    errors: list[BaseException] = []

    def work() -> None:
        try:
            mixed.work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert errors == []
    lineage = Lineage(mixed.store)
    newest = lineage.newest()
    accepted = [
        position
        for number in range(1, newest.number + 1)
        for item in lineage.round(number).manifest.accepted
        for start, stop in item.positions
        for position in range(start, stop)
    ]
    assert sorted(accepted) == list(range(spec.num_positions))
    assert (
        len(
            {item.attempt for n in range(1, newest.number + 1) for item in lineage.round(n).manifest.accepted}
        )
        == 2
    )
