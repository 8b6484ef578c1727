"""Models on the hub: pushed with a card, loaded back by plain transformers."""

import json
import math
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import msgspec
import pytest
from huggingface_hub import ModelCard
from metaflow._vendor.click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

from metaflow_hf.errors import ConfigError
from metaflow_hf.events import Evaluated
from metaflow_hf.hub.model_card import CardFacts, Result, model_card
from metaflow_hf.report.outcome import Outcome, Plan
from metaflow_hf.report.units import byte_size
from metaflow_hf.store import configured_store, datastore
from metaflow_hf.store.models import load_directory, save_directory
from metaflow_hf.train import publishing
from metaflow_hf.train.job import TrainingJob
from metaflow_hf.train.provenance import provenance
from metaflow_hf.train.publishing import publish, write_card
from metaflow_hf.train.records import Round
from metaflow_hf.train.results import find_results, store_results
from metaflow_hf_cli.fixtures import OWNER, fixture_content
from metaflow_hf_cli.group import hf

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def own_hub(start_hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", OWNER)
    return start_hub(fixture_content())


@pytest.fixture(scope="module")
def trained(tmp_path_factory, model_dir: Path, dataset_dir: Path):
    """A trained and measured model in a datastore: (root of the datastore, job, reference)."""
    root = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datastore, "_active", ("local", str(root / ".metaflow")))
        patch.setenv("METAFLOW_HF_CACHE", str(root / "cache"))
        values = {
            "model": {"repo_id": "acme/tiny"},
            "data": {
                "dataset": str(dataset_dir.parent / "raw.txt"),
                "heldout_samples": 20,
                "sequence_length": 32,
                "samples_per_block": 40,
                "dataset_chunk_size": 20,
            },
            "rounds": {"claim_samples": 10, "seconds": 0.05},
            "evaluation": {"prompts": ["the value"], "max_new_tokens": 5, "every_rounds": 2},
        }
        job = TrainingJob.configured(values, run="F-1").check_data().build()
        plan = job.begin(model_dir, {"commit_hash": "c" * 40})
        metrics = job.work(model_dir, branch=0, write=lambda _: None)
        reference = job.export(model_dir, pathspec="F/1/merge/5")
        directory = load_directory(configured_store(), reference, root / "out")
        job.evaluate(model_dir, directory, plan=plan, model=reference, metrics=[metrics], run="F/1")
    return root, job, reference


@pytest.fixture
def here(trained, monkeypatch):
    root, job, reference = trained
    monkeypatch.setattr(datastore, "_active", ("local", str(root / ".metaflow")))
    monkeypatch.setenv("METAFLOW_HF_CACHE", str(root / "cache"))
    return job, reference


def test_a_pushed_model_loads_in_plain_transformers_and_its_card_says_all(own_hub, here, tmp_path):
    _, reference = here
    done = publish(configured_store(), reference, "acme/mine", private=True)
    assert own_hub.content.repo("acme/mine").resolve().sha == done.commit_hash
    back = huggingface_hub.snapshot_download("acme/mine", local_dir=tmp_path / "back")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(back), AutoTokenizer.from_pretrained(back)
    assert model.generate(**tokenizer("the value", return_tensors="pt"), max_new_tokens=2).shape[1] > 2

    card = ModelCard.load(Path(back) / "README.md")
    assert card.data.base_model == "acme/tiny"
    assert card.data.library_name == "transformers"
    measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert set(measured) == {"loss", "perplexity", "bits_per_byte"}
    text = card.text
    for said in (
        "c" * 40,
        "F/1",
        reference["digest"],
        "learning_rate: 0.0002",
        "the value⟶",
        'from_pretrained("acme/mine")',
    ):
        assert said in text
    picture = (Path(back) / "training_loss.svg").read_text()
    assert "![Training loss](training_loss.svg)" in text
    assert picture.startswith("<svg")
    assert "tokens trained" in picture


def test_a_dry_run_asks_no_hub(here, monkeypatch):
    job, reference = here
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    done = publish(configured_store(), reference, "acme/mine", dry_run=True)
    names = [name for name, _ in done.files]
    assert {"README.md", "config.json", "model.safetensors", "training_loss.svg"} <= set(names)
    assert (done.url, done.commit_hash) == ("", "")
    shown = CliRunner().invoke(hf, ["models", "push", reference["key"], "acme/mine", "--dry-run"])
    assert shown.exit_code == 0, shown.output
    assert "model.safetensors" in shown.output
    assert "base_model: acme/tiny" in shown.output
    said: list[str] = []
    configured = TrainingJob.from_json(
        {
            **job.to_json(),
            "config": job.config.replace(publish={"repo_id": "acme/mine", "dry_run": True}).model_dump(
                mode="json"
            ),
        }
    )
    configured.publish(reference, write=said.append)
    assert said[0].startswith(f"would push {len(names)} files")
    assert job.publish(reference, write=said.append) is None


def test_what_a_run_publishes_is_fine_tuned_by_its_name(own_hub, here, tmp_path):
    """The last step of a run; then other texts, which the model of the hub predicts better after a training."""
    job, reference = here
    said: list[str] = []
    config = job.config.replace(publish={"repo_id": "acme/pretrained"})
    done = replace(job, config=config).publish(reference, write=said.append)
    assert own_hub.content.repo("acme/pretrained").resolve().sha == done.commit_hash
    assert said == [
        f"pushed {len(done.files)} files, {byte_size(sum(dict(done.files).values()))} to {done.url}"
    ]

    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"row {n % 7} of the file with the name of row {n % 5}\n" for n in range(60)))
    values = {
        "model": {"repo_id": "acme/pretrained"},
        "data": {
            "dataset": str(texts),
            "heldout_samples": 10,
            "sequence_length": 32,
            "dataset_chunk_size": 20,
        },
        "rounds": {"claim_samples": 10, "seconds": 0.05},
        "optimizer": {"learning_rate": 1e-2},
    }
    tuning = TrainingJob.configured(values, run="G-1").check_data().build()
    base_dir = Path(huggingface_hub.snapshot_download("acme/pretrained", local_dir=tmp_path / "base"))
    plan = tuning.begin(base_dir, {"commit_hash": done.commit_hash})
    metrics = tuning.work(base_dir, branch=0, write=lambda _: None)
    tuned = tuning.export(base_dir, pathspec="G/1/merge/5")
    directory = load_directory(configured_store(), tuned, tmp_path / "tuned")
    outcome = tuning.evaluate(base_dir, directory, plan=plan, model=tuned, metrics=[metrics], run="G/1")
    assert outcome.after.loss < outcome.before.loss - 0.1


def test_the_command_pushes_what_a_key_names(own_hub, here):
    _, reference = here
    pushed = CliRunner(mix_stderr=False).invoke(hf, ["models", "push", reference["key"], "acme/by-key"])
    assert pushed.exit_code == 0, pushed.stderr
    assert own_hub.content.repo("acme/by-key").resolve().sha in pushed.stdout


def test_without_the_package_that_draws_there_is_a_card_without_plot(here, monkeypatch, caplog):
    _, reference = here
    monkeypatch.setattr(
        publishing, "svg", lambda chart: (_ for _ in ()).throw(ConfigError("metaflow-hf[publish]"))
    )
    done = publish(configured_store(), reference, "acme/mine", dry_run=True)
    assert "training_loss.svg" not in dict(done.files)
    assert "![" not in done.card
    assert "metaflow-hf[publish]" in caplog.text


def test_a_model_that_no_lineage_knows_has_a_card_too(here, model_dir):
    from metaflow_hf.store.models import save_directory

    reference = save_directory(configured_store(), model_dir, flow="G", run="1", step="s", task="2")
    done = publish(configured_store(), reference.to_json(), "acme/plain", dry_run=True)
    assert done.card.startswith("---\n")
    assert "## Results" not in done.card


def test_text_of_others_is_no_markup():
    facts = CardFacts(
        name="acme/mine",
        base_model="not a hub id | `x`",
        dataset="s3://bucket/a|b",
        rows=[("run", "F/1 | `boom`")],
        results=[Result(metric="perplexity", value=12.3456, dataset="a | b", before=99.0)],
        samples=[("```\n# head", "<img src=x>")],
        hyperparameters={"optimizer": {"learning_rate": 1e-3}},
    )
    card = model_card(facts)
    assert "\n````text\n```\n# head⟶<img src=x>\n````\n" in card
    assert "| run | `` F/1 \\| `boom` `` |" in card
    assert "| perplexity | `a \\| b` | 99 | **12.35** |" in card
    assert "base_model" not in ModelCard(card).data.to_dict()


def test_from_a_model_back_to_commits_data_chunks_and_rounds(here):
    _, reference = here
    shown = CliRunner(mix_stderr=False).invoke(
        hf, ["models", "show", reference["key"], "--lineage", "--json"]
    )
    assert shown.exit_code == 0, shown.stderr
    [found] = json.loads(shown.stdout)
    assert found["digest"] == reference["digest"]
    assert found["run"] == "F/1"
    assert found["sources"]["model"] == "acme/tiny"
    assert found["sources"]["model_commit"] == "c" * 40
    assert found["positions"] == [[0, 10]]
    assert (found["chunks_done"], found["chunks_total"]) == (5, 5)
    assert sum(one["tokens"] for one in found["rounds"]) == found["tokens"] == reference["metadata"]["tokens"]
    assert [one["round"] for one in found["rounds"]] == list(range(1, reference["metadata"]["rounds"] + 1))
    assert found["figures"]["after"]["loss"] < found["figures"]["before"]["loss"]
    manifest = json.loads(configured_store().get(f"training/{found['lineage']}/spec.json"))
    assert found["dataset"] == manifest["dataset"]

    text = CliRunner().invoke(hf, ["models", "show", reference["key"], "--lineage"]).output
    assert "acme/tiny @ cccccccccccc" in text
    assert "5 of 5 are in the model" in text


def test_a_model_that_was_trained_from_a_model_names_both(here, model_dir):
    from metaflow_hf.train.lineage import Lineage

    _, first = here
    store = configured_store()
    spec = Lineage(store.child("training/F-1")).spec()
    sources = {**spec.sources, "model": "F/1", "model_key": first["key"]}
    child = Lineage(store.child("training/child"))
    child.create_spec(msgspec.structs.replace(spec, lineage="child", sources=sources))
    child.create_round(Round(nonce="n", round=0, parent=None, weights=spec.initial_weights))
    metadata = {"lineage": "child", "rounds": 0, "tokens": 0}
    second = save_directory(store, model_dir, flow="G", run="1", step="s", task="2", metadata=metadata)
    chain = list(provenance(store, second.to_json()))
    assert [one.key for one in chain] == [second.key, first["key"]]
    assert chain[0].positions == ()
    # The lineage of the first is collected and gone: what the model itself says is left.
    alone = {**first, "metadata": {**first["metadata"], "lineage": "no-more"}}
    [found] = provenance(store, alone)
    assert (found.sources["model"], found.rounds) == ("acme/tiny", ())


def test_figures_that_are_not_finite_are_kept_and_named(here, tmp_path):
    _, reference = here
    store = configured_store()
    measured = {"time": 0.0, "tokens": 5, "bytes": 9, "bits_per_byte": math.nan}
    outcome = Outcome(
        plan=Plan(base_model="m", dataset="d"),
        before=Evaluated(name="before", loss=900.0, perplexity=math.inf, **measured),
        after=Evaluated(name="after", loss=2.0, perplexity=7.4, **measured),
        model={**reference, "digest": "d" * 64},
    )
    store_results(store.child("training/F-1"), outcome, [])
    found = find_results(store, outcome.model)
    assert math.isinf(float(found.figures["before"]["perplexity"]))
    assert found.figures["after"]["loss"] == 2.0
    card = write_card(store, outcome.model, "acme/other", tmp_path)
    assert "| inf | **7.4** |" in card
    # No number that the hub would refuse.
    results = ModelCard(card).data.eval_results
    assert [one.metric_type for one in results] == ["loss", "perplexity"]


@pytest.mark.parametrize("metadata", [{"tokens": "300B", "rounds": [1]}, {"lineage": 3, "tokens": None}])
def test_metadata_that_users_wrote_by_our_names_is_no_hindrance(here, model_dir, metadata):
    store = configured_store()
    config = model_dir / "config.json"
    saved = save_directory(store, config, flow="G", run="1", step="s", task="2", metadata=metadata).to_json()
    assert "# acme/theirs" in publish(store, saved, "acme/theirs", dry_run=True).card
    [found] = provenance(store, saved)
    assert (found.tokens, found.rounds) == (0, ())
