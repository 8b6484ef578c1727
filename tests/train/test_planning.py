"""What a run tells about itself before its first step."""

import json

import pytest

from metaflow_hf.data import build_blocks
from metaflow_hf.errors import ConfigError
from metaflow_hf.train.planning import Extent, make_plan

SPEED = 1000.0


@pytest.fixture
def plan_of(training, monkeypatch):
    # How fast this machine is, nobody knows.
    monkeypatch.setattr("metaflow_hf.train.planning.tokens_per_second", lambda *_, **__: SPEED)

    def make(**rounds):
        spec = training.start(data={"epochs": 20}, rounds={"claim_samples": 1, **rounds})
        with training.blocks() as blocks:
            arguments = {"model_dir": training.model_dir, "config": training.config, "base_model": {}}
            return make_plan(Extent.of(spec), blocks, None, **arguments)

    return make


def test_a_run_of_few_rounds_is_told_what_to_set(plan_of, training):
    plan = plan_of(workers=2, seconds=1.0)
    assert plan.rounds < 40
    (note,) = [note for note in plan.notes if "rounds" in note and "sequences" not in note]
    assert f"about {plan.rounds} rounds" in note
    seconds = float(note.partition("set rounds.seconds to ")[2].split()[0])
    training.lineage = "with the advice"
    training.store = training.store.child("another")
    advised = plan_of(workers=2, seconds=seconds)
    assert advised.rounds >= 0.9 * 40


@pytest.mark.parametrize("rounds", [{"workers": 2, "seconds": 0.1}, {"workers": 1, "seconds": 1.0}])
def test_many_rounds_and_a_single_worker_need_no_advice(plan_of, rounds):
    assert not [note for note in plan_of(**rounds).notes if "fewer than" in note]


@pytest.mark.parametrize("policy", ["drop", "truncate"])
def test_where_nothing_with_loss_is_left_the_setting_is_named(plan_of, training, policy):
    if policy == "truncate":
        rows = [{"prompt": "the value of a file is not the name", "completion": " of it"}] * 3
        rows += [{"prompt": "a list of the name of the value is", "completion": " it"}] * 3
        training.dataset_dir = training.dataset_dir.parent / "prompts"
        (training.dataset_dir.parent / "prompts.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )
        build_blocks(training.dataset_dir.parent / "prompts.jsonl", training.dataset_dir)
    training.config = training.config.replace(data={"long_documents": policy, "sequence_length": 4})
    with pytest.raises(
        ConfigError, match=rf"data.long_documents: {policy} at data.sequence_length: 4: .*longer"
    ):
        plan_of(workers=1, max_tokens=1000)
