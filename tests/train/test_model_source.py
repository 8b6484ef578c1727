"""A local directory as the model that training begins with."""

import json
import shutil
from pathlib import Path

import pytest

from metaflow_hf.config import ModelConfig, TrainConfig
from metaflow_hf.config_sections import local_directory
from metaflow_hf.errors import ConfigError, UnsupportedModelError
from metaflow_hf.store import configured_store, datastore
from metaflow_hf.store.models import find_manifest, load_directory
from metaflow_hf.train.job import TrainingJob
from metaflow_hf.train.spec import hyperparameters

NEEDED = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
JUNK = (
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "training_args.bin",
    "trainer_state.json",
    "train_results.json",
    "train.log",
    "data.txt",
    "secrets.json",
    "consolidated.safetensors",
    "pytorch_model.bin",
    "train.py",
    ".env",
    ".git/HEAD",
    ".cache/huggingface/download/config.json.metadata",
    "checkpoint-10/config.json",
    "runs/events.out",
)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(datastore, "_active", ("local", str(tmp_path / "store")))
    monkeypatch.setenv("METAFLOW_HF_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def directory(place, model_dir) -> Path:
    directory = shutil.copytree(model_dir, place / "mine")
    for name in JUNK:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"junk")
    return directory


def job_of(name: str = "./mine", **model) -> TrainingJob:
    values = {
        "model": {"repo_id": name, **model},
        "data": {"dataset": "hf://acme/none", "sequence_length": 32},
    }
    return TrainingJob.configured(values, run="F-2")


def stored_files(reference: dict) -> set[str]:
    return {file.path for file in find_manifest(configured_store(), reference)[1].files}


def test_what_transformers_needs_is_stored_and_nothing_else(place, directory):
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates/rag.jinja").write_text("{{ messages }}")
    (directory / "generation_config.json").write_text("{}")
    job, reference = job_of().save_directory("F/1/start/2")
    found = stored_files(reference)
    assert found >= NEEDED | {"additional_chat_templates/rag.jinja", "generation_config.json"}
    assert not found & {*JUNK}
    assert {path for path in found if path not in NEEDED} <= {
        path.relative_to(directory).as_posix() for path in directory.rglob("*")
    }
    job.check_model(reference)
    loaded = load_directory(configured_store(), reference, place / "loaded")
    assert (loaded / "model.safetensors").read_bytes() == (directory / "model.safetensors").read_bytes()


def test_the_job_goes_on_with_the_reference(place, directory):
    job, reference = job_of().save_directory("F/1/start/2")
    assert reference["label"] == "mine"
    assert (job.config.model.repo_id, job.config.model.reference) == (None, reference["key"])
    told = json.dumps([job.to_json(), reference])
    assert str(place) not in told
    assert TrainingJob.from_json(job.to_json()) == job
    # A retry of the task gives the same reference; another run the same content, which is not stored again.
    again = job_of().save_directory("F/1/start/2")
    assert again[1]["key"] == reference["key"]
    blobs = len(list((place / "store").rglob("blobs/*/*")))
    other, elsewhere = job_of(str(directory)).save_directory("F/2/start/1")
    assert elsewhere["digest"] == reference["digest"]
    assert len(list((place / "store").rglob("blobs/*/*"))) == blobs
    # So it may join the same lineage.
    assert hyperparameters(job.config, directory) == hyperparameters(other.config, directory)


def test_links_are_followed_and_shards_found(place, model_dir):
    (place / "mine").mkdir()
    for path in model_dir.iterdir():
        (place / "mine" / path.name).symlink_to(path)
    (place / "mine/model.safetensors").rename(place / "mine/model-00001-of-00001.safetensors")
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (place / "mine/model.safetensors.index.json").write_text(json.dumps(index))
    found = stored_files(job_of().save_directory("F/1/start/2")[1])
    assert {"model-00001-of-00001.safetensors", "model.safetensors.index.json"} <= found


def test_pickles_and_code_are_stored_where_they_are_trusted(place, directory):
    (directory / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModelError, match="mine has its weights only as pickle"):
        job_of().save_directory("F/1/start/2")
    job, reference = job_of(allow_pickle=True, trust_remote_code=True).save_directory("F/1/start/2")
    found = stored_files(reference)
    assert {"pytorch_model.bin", "train.py"} <= found
    assert not found & {"optimizer.pt", "training_args.bin"}
    assert job.config.model.trust_remote_code


def test_weights_are_not_needed_for_random_ones(place, directory):
    for path in (*directory.glob("*.safetensors"), *directory.glob("*.bin")):
        path.unlink()
    with pytest.raises(UnsupportedModelError, match="mine holds no weights"):
        job_of().save_directory("F/1/start/2")
    assert job_of(initialise="random").save_directory("F/1/start/2")[1]["num_files"] >= 3


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "mine has no config.json"),
        ({"adapter_config.json": {"base_model_name_or_path": "gpt2"}}, "mine is an adapter of gpt2"),
    ],
)
def test_a_directory_without_a_model_is_refused_before_anything_is_stored(place, files, said):
    (place / "mine").mkdir()
    for name, values in files.items():
        (place / "mine" / name).write_text(json.dumps(values))
    with pytest.raises(UnsupportedModelError, match=said):
        job_of().save_directory("F/1/start/2")
    assert not [path for path in (place / "store").rglob("*") if path.is_file()]


def test_a_directory_that_is_gone_since_is_an_error(place, directory):
    job = job_of()
    shutil.rmtree(directory)
    with pytest.raises(ConfigError, match="the directory './mine' does not exist here"):
        job.save_directory("F/1/start/2")


@pytest.mark.parametrize(
    ("name", "is_path"),
    [
        ("gpt2", False),
        ("owner/name", False),
        ("owner/na.me-1_b", False),
        ("./gpt2", True),
        ("../gpt2", True),
        ("/gpt2", True),
        ("~/gpt2", True),
        (".", True),
        ("gpt2/", True),
        ("a/b/c", True),
    ],
)
def test_a_path_looks_like_one(name, is_path):
    assert (local_directory(name) is not None) == is_path


def test_code_that_is_trusted_needs_a_commit_only_where_it_can_change():
    TrainConfig.parse({"model": {"repo_id": "./mine", "trust_remote_code": True}})
    TrainConfig.parse({"model": {"reference": "models/F/1/s/2/m-0.json", "trust_remote_code": True}})
    for model in ({"repo_id": "acme/mine"}, {"reference": "TrainFlow"}):
        with pytest.raises(ConfigError, match="the revision must be a full commit hash"):
            TrainConfig.parse({"model": {**model, "trust_remote_code": True}})


def test_the_name_of_a_directory_is_its_last_part(place):
    assert ModelConfig(repo_id=str(place / "some" / "mine")).name == "mine"
    assert ModelConfig(repo_id=".").name == place.name
    assert job_of_path(place).without_path().config.model.repo_id == f"./{place.name}"


def job_of_path(place: Path) -> TrainingJob:
    return job_of(str(place))
