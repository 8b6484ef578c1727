"""Configurations as they are shipped, trained on stand-ins of what they name; and going on from what they made."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

import pytest
import yaml
from stand_ins import stand_in_hub

from metaflow_hf.config import read_yaml
from metaflow_hf.events import RoundClosed, StepDone
from metaflow_hf.hub import snapshot_download
from metaflow_hf.report import parse_events
from metaflow_hf.store import configured_store, datastore
from metaflow_hf.store.models import find_reference, load_directory
from metaflow_hf.train.job import TrainingJob
from metaflow_hf.train.lineage import Lineage

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def place(start_hub, tmp_path: Path, monkeypatch) -> Path:
    start_hub(stand_in_hub(330))
    monkeypatch.setattr(datastore, "_active", ("local", str(tmp_path / ".metaflow")))
    monkeypatch.delenv("METAFLOW_RUNTIME_ENVIRONMENT", raising=False)
    # How fast this machine is does not matter here.
    monkeypatch.setattr("metaflow_hf.train.planning.tokens_per_second", lambda *_, **__: 1000.0)
    return tmp_path


def train(place: Path, name: str, model_dir: Path | str, *, base_model=None, changes=None, **parameters):
    """The steps of the flow; returns what came of it."""
    values = read_yaml(CONFIGS / name)
    for section, items in (changes or {}).items():
        values.setdefault(section, {}).update(items)
    job = TrainingJob.configured(values, run=f"F-{name}", **parameters).pinned().check_data().build()
    plan = job.begin(model_dir, base_model or {"commit_hash": "c" * 40, "key": "snapshots/x"})
    metrics = job.work(model_dir, branch=0, write=lambda _: None)
    model = job.export(model_dir, pathspec="F/1/merge/5", base_model=base_model)
    trained = load_directory(configured_store(), model, place / f"trained-{name}")
    outcome = job.evaluate(model_dir, trained, plan=plan, model=model, metrics=[metrics], run="F/1")
    return model, trained, outcome


@pytest.mark.parametrize(
    ("name", "repo_id"),
    [
        ("chat.yaml", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("finetune_lora.yaml", "HuggingFaceTB/SmolLM2-1.7B"),
        ("mixture.yaml", "HuggingFaceTB/SmolLM2-135M-Instruct"),
    ],
)
def test_a_configuration_trains_as_it_stands(place: Path, name: str, repo_id: str):
    model_dir = snapshot_download(repo_id, local_dir=str(place / "base"))
    _, trained, outcome = train(place, name, model_dir)
    assert outcome.after.loss < outcome.before.loss
    assert outcome.after.counted == ("" if name == "finetune_lora.yaml" else "assistant")
    assert all(one.loss_after < one.loss_before for one in outcome.datasets)
    assert len(outcome.datasets) == (3 if name == "mixture.yaml" else 0)
    assert (trained / "adapter_config.json").exists() == (name == "finetune_lora.yaml")


def test_training_goes_on_from_a_model_of_another_run(place: Path):
    """Pre-trained from random weights, then fine-tuned from the reference alone: better on held-out text each time."""
    model_dir = snapshot_download("gpt2", local_dir=str(place / "base"))
    fast = {
        "optimizer": {"learning_rate": 1e-2},
        "data": {"epochs": 3, "sequence_length": 64, "batch_size": 2},
    }
    first, pretrained, before = train(
        place, "finetune_full.yaml", model_dir, changes={**fast, "model": {"initialise": "random"}}
    )
    assert before.after.loss < before.before.loss - 0.5
    reference = find_reference(configured_store(), first["key"])
    assert reference.to_json()["digest"] == first["digest"]
    smaller = {
        "data": {"epochs": 2, "sequence_length": 64, "batch_size": 2},
        "optimizer": {"learning_rate": 1e-3},
    }
    second, _, after = train(
        place,
        "continual.yaml",
        pretrained,
        base_model=reference.to_json(),
        changes=smaller,
        reference=first["key"],
    )
    assert after.before.loss == pytest.approx(before.after.loss, abs=1e-4)
    assert after.after.loss < after.before.loss
    assert second["metadata"]["base_model"] == first["key"]


def steps_of(metrics: str) -> list[StepDone]:
    return [event for event in parse_events(metrics) if isinstance(event, StepDone)]


SMALL = {
    "data": {
        "sequence_length": 32,
        "batch_size": 2,
        "heldout_samples": 40,
        "dataset_chunk_size": 20,
        "seed": 5,
    },
    "optimizer": {"learning_rate": 1e-2},
    # Rounds of one claim, on however fast a machine.
    "rounds": {"claim_samples": 5, "seconds": 0.001, "max_tokens": 2500},
}


def job_of(run: str, *, lineage: str, workers: int = 1) -> TrainingJob:
    values = yaml.safe_load(json.dumps({"model": {"repo_id": "gpt2"}, **SMALL}))
    values["data"]["dataset"] = "hf://roneneldan/TinyStories"
    values["rounds"]["workers"] = workers
    return TrainingJob.configured(values, run=run, lineage=lineage).pinned().check_data().build()


class Killed(BaseException):
    """As by SIGKILL: nothing of ours catches it."""


def killed_after_two_rounds(job: TrainingJob, model_dir: str, monkeypatch) -> list[StepDone]:
    """The steps that a worker made before its end."""
    seen: list[StepDone] = []

    def listen(event):
        if isinstance(event, StepDone):
            seen.append(event)
        if isinstance(event, RoundClosed) and event.round >= 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("metaflow_hf.train.listening.fan_out", lambda *_: listen)
        with pytest.raises(Killed):
            job.work(model_dir, branch=0, write=lambda _: None)
    return seen


def test_another_run_of_the_same_lineage_goes_on_at_the_same_point(place: Path, monkeypatch):
    """Losses, learning rates and tokens are those of a run that nobody interrupted."""
    model_dir = snapshot_download("gpt2", local_dir=str(place / "base"))
    whole = job_of("A", lineage="whole")
    whole.begin(model_dir, {"commit_hash": "c" * 40})
    expected = steps_of(whole.work(model_dir, branch=0, write=lambda _: None))
    first = job_of("B", lineage="parts")
    first.begin(model_dir, {"commit_hash": "c" * 40})
    seen = killed_after_two_rounds(first, model_dir, monkeypatch)
    second = job_of("C", lineage="parts")
    second.begin(model_dir, {"commit_hash": "c" * 40})
    found = [*seen, *steps_of(second.work(model_dir, branch=0, write=lambda _: None))]
    assert 0 < len(seen) < len(expected)
    for what in ("loss", "learning_rate", "tokens", "tokens_total"):
        assert [getattr(step, what) for step in found] == [getattr(step, what) for step in expected], what


def test_another_number_of_workers_goes_on_where_the_first_stopped(place: Path, monkeypatch):
    model_dir = snapshot_download("gpt2", local_dir=str(place / "base"))
    first = job_of("A", lineage="grows")
    first.begin(model_dir, {"commit_hash": "c" * 40})
    seen = killed_after_two_rounds(first, model_dir, monkeypatch)
    more = job_of("B", lineage="grows", workers=2)
    more.begin(model_dir, {"commit_hash": "c" * 40})
    # Signals are the main thread's.
    monkeypatch.setattr("metaflow_hf.train.stopping.signal.signal", lambda *_: None)
    with ThreadPoolExecutor(2) as pool:
        texts = list(pool.map(lambda n: more.work(model_dir, branch=n, write=lambda _: None), range(2)))
    later = sorted((step for text in texts for step in steps_of(text)), key=lambda step: step.time)
    # Not a token is trained again, and the rate goes on from where it was to where it would have ended.
    assert min(step.tokens_total for step in later) > seen[-1].tokens_total
    assert seen[-1].learning_rate >= max(step.learning_rate for step in later)
    assert later[-1].learning_rate < 0.5 * seen[-1].learning_rate
    done = Lineage(configured_store().child("training/grows")).newest().manifest
    assert done.final
    assert done.tokens == seen[-1].tokens_total + sum(step.tokens for step in later)
    assert mean(step.loss for step in later[-5:]) < mean(step.loss for step in seen[:5])
