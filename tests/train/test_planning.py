"""What a run tells about itself before its first step."""

import pytest

from metaflow_hf.report import plan_text
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
    (note,) = plan.notes
    assert f"about {plan.rounds} rounds" in note
    seconds = float(note.partition("set rounds.seconds to ")[2].split()[0])
    training.lineage = "with the advice"
    training.store = training.store.child("another")
    advised = plan_of(workers=2, seconds=seconds)
    assert advised.rounds >= 0.9 * 40


@pytest.mark.parametrize("rounds", [{"workers": 2, "seconds": 0.1}, {"workers": 1, "seconds": 1.0}])
def test_many_rounds_and_a_single_worker_need_no_advice(plan_of, rounds):
    assert plan_of(**rounds).notes == ()


def test_where_all_rows_looked_at_are_left_out_the_plan_says_so(plan_of, training):
    training.config = training.config.replace(data={"long_documents": "drop", "sequence_length": 4})
    plan = plan_of(workers=1, max_tokens=1000)
    assert (plan.tokens, plan.rounds, plan.claims) == (0, 0, 0)
    assert "about 100 % of the documents are longer" in plan.notes[-1]
    assert "0 tokens" in plan_text(plan)
