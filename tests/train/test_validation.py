"""Held-out text while training goes on: measured every few rounds, early stopping, and the best round's weights."""

import json
import math

import pytest

from metaflow_hf.config import EarlyStopConfig, TrainConfig
from metaflow_hf.errors import ConfigError
from metaflow_hf.events import Evaluated, RoundClosed, Sampled
from metaflow_hf.store import open_store
from metaflow_hf.store.models import load_directory
from metaflow_hf.train import evaluate, export_lineage
from metaflow_hf.train import measuring as measuring_module
from metaflow_hf.train.heldout import heldout_rows
from metaflow_hf.train.lineage import Lineage
from metaflow_hf.train.records import Payload, Validation
from metaflow_hf.train.validation import best_of, stop_reason

TASK = {"flow": "F", "run": "1", "step": "join", "task": "7"}


def validation(number, loss):
    weights = Payload(key=f"weights/{number}", digest=f"{number:064x}", size=1)
    return Validation(
        round=number,
        attempt="a",
        weights=weights,
        tokens_total=number,
        loss=loss,
        bits_per_byte=loss,
        tokens=1,
        bytes=1,
    )


@pytest.mark.parametrize(
    ("losses", "stops"),
    [
        ([], False),
        ([3.0, 3.1], False),
        ([3.0, 3.1, 3.2], True),
        ([3.0, 3.1, 2.9], False),
        ([3.0, 2.9995, 2.9992], True),  # not better by more than 0.001
        ([3.0, 2.0, 2.1], False),
        ([3.0, 2.0, 2.1, 2.2], True),
        ([3.0, None, None], True),  # not finite
        ([None, 3.0, None, 2.0], False),
        ([None, None, None], False),
    ],
)
def test_when_it_is_enough(losses, stops):
    settings = EarlyStopConfig(patience=2, min_improvement=0.001)
    found = [validation(number, loss) for number, loss in enumerate(losses, 1)]
    assert bool(stop_reason(found[::-1], settings)) is stops


def test_the_best_is_the_earliest_of_equals():
    assert best_of([]) is None
    assert best_of([validation(3, 1.0), validation(2, 1.0), validation(1, 2.0)]).round == 2
    assert best_of([validation(1, None), validation(2, 1.0)]).round == 2
    assert best_of([validation(1, None)]) is None


def test_settings_that_need_measurements_are_refused_without():
    for section in ({"early_stop": {}}, {"model": "best"}):
        with pytest.raises(ConfigError, match="needs every_rounds"):
            TrainConfig.parse({"evaluation": section})


@pytest.fixture
def measured(training, monkeypatch):
    """A training whose held-out losses are those given, one a measurement, whatever the model says."""

    def run(losses, **sections):
        plain, left = measuring_module.measure, iter(losses)

        def measure(*arguments):
            found = plain(*arguments)
            loss = next(left)
            if isinstance(loss, Exception):
                raise loss
            object.__setattr__(found.evaluation, "loss", loss)
            return found

        monkeypatch.setattr(measuring_module, "measure", measure)
        evaluation = {"every_rounds": 2, "prompts": ["the value"], "max_new_tokens": 3}
        training.start(
            data={"epochs": 4, "evaluation_dataset": None},
            rounds={"seconds": 0.01, "keep": "recent"},
            evaluation={**evaluation, **sections},
        )
        return training

    return run


def test_a_measurement_that_is_not_finite_is_no_best_and_no_end(measured):
    training = measured([math.nan, 2.0, *[math.inf] * 100], model="best")
    training.work()
    found = Lineage(training.store).validations()
    assert [item.loss for item in found[:3]] == [None, 2.0, None]
    assert best_of(found) is found[1]


def test_rounds_are_measured_and_sampled_as_the_exported_model_is(training, tmp_path):
    training.start(
        data={"evaluation_dataset": None},
        rounds={"seconds": 0.01, "keep": "recent"},
        evaluation={"every_rounds": 8, "prompts": ["the value"], "max_new_tokens": 3},
    )
    events = []
    training.work(on_event=events.append)
    found = [event for event in events if isinstance(event, Evaluated)]
    samples = [event for event in events if isinstance(event, Sampled)]
    final = [event for event in events if isinstance(event, RoundClosed)][-1]
    assert [event.round for event in found] == [8, 16, final.round] == [event.round for event in samples]
    assert found[-1].loss < found[0].loss
    reference = export_lineage(
        store=training.store,
        models=open_store(tmp_path / "models"),
        model_dir=training.model_dir,
        config=training.config,
        **TASK,
    )
    assert reference.metadata["held_out_loss"] == found[-1].loss
    directory = load_directory(open_store(tmp_path / "models"), reference, tmp_path / "out")
    with training.blocks() as blocks:
        texts = [row.value for row in heldout_rows(blocks, training.config)]
    assert evaluate(directory, texts, sequence_length=32).loss == pytest.approx(found[-1].loss, rel=1e-5)


def test_training_is_the_same_whether_it_is_measured_or_not(training, tmp_path):
    def weights(name, **sections):
        training.store = open_store(tmp_path / name)
        training.start(
            data={"evaluation_dataset": None}, rounds={"seconds": 0.01, "max_tokens": 1_000}, **sections
        )
        training.work()
        return Lineage(training.store).newest().manifest.weights.digest

    model = {"every_rounds": 1, "prompts": ["the"], "max_new_tokens": 2}
    assert weights("plain") == weights("measured", evaluation=model)


def test_early_stopping_ends_the_run_for_everybody_and_keeps_the_best_round(measured, tmp_path):
    training = measured([5.0, 4.0, 4.5, 4.6, 4.7], early_stop={"patience": 2})
    events = []
    training.work(on_event=events.append)
    last = [event for event in events if isinstance(event, RoundClosed)][-1]
    assert last.final
    assert "4.0000 of round 4 was not improved in 2 measurements" in last.stopped
    assert last.round == 9
    assert last.positions_done < last.positions_total
    # The weights of round 4 are there, those of its neighbours are swept.
    swept = {int(path.name) for path in (tmp_path / "store/weights").iterdir() if any(path.rglob("*.saf*"))}
    assert 4 in swept
    assert not {1, 2, 3, 5, 6} & swept
    arguments = {
        "store": training.store,
        "models": open_store(tmp_path / "models"),
        "model_dir": training.model_dir,
        "config": training.config,
        **TASK,
    }
    best = export_lineage(**arguments, best=True)
    assert best.metadata["rounds"] == 4
    assert best.metadata["held_out_loss"] == 4.0
    assert export_lineage(**arguments, best=True) == best
    final = export_lineage(**arguments)
    assert (final.metadata["rounds"], final.label) == (9, "model")
    assert final.digest != best.digest
    # Another worker finds the run ended.
    training.work()


def test_who_dies_while_measuring_costs_that_measurement_only(measured):
    training = measured([RuntimeError("killed"), 3.0, 2.0, *[1.0] * 50])
    with pytest.raises(RuntimeError, match="killed"):
        training.work()
    training.work()
    found = Lineage(training.store).validations()
    assert found[0].round == 4
    assert json.loads(training.store.get("evaluations/0000000004.json"))["loss"] == 3.0
    assert Lineage(training.store).newest().manifest.final
