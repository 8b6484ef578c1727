"""What a model cannot do is found in its description, without weights."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import MambaConfig

from metaflow_hf.config import TrainConfig
from metaflow_hf.errors import ConfigError, UnsupportedModelError
from metaflow_hf.store import configured_store, datastore
from metaflow_hf.store.models import save_directory
from metaflow_hf.train.job import TrainingJob
from metaflow_hf.train.suitability import check_model

CHUNKED = {"use_chunked_training": True}


@pytest.fixture
def described(tmp_path: Path, model_dir: Path) -> Path:
    """The model without its weights."""
    target = tmp_path / "described"
    shutil.copytree(model_dir, target, ignore=shutil.ignore_patterns("*.safetensors"))
    return target


@pytest.fixture
def dynamic(described: Path) -> Path:
    """One whose rope depends on the length of the whole sequence."""
    values = json.loads((described / "config.json").read_text())
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    (described / "config.json").write_text(json.dumps({**values, "rope_parameters": rope}))
    return described


def config_of(**sections) -> TrainConfig:
    sections = {"data": {"sequence_length": 32}, **sections}
    return TrainConfig.parse(
        {**sections, "model": {"repo_id": "acme/mine", **sections.get("model", {})}},
    )


def test_an_ordinary_model_can_do_everything(described):
    for rollout in ({"gradient_checkpointing": True}, {"gradient": "truncated"}, {"use_cpu_offload": True}):
        check_model(
            described,
            config_of(
                data={"sequence_length": 32, "packing": "isolated"},
                rollout={**CHUNKED, **rollout},
                model={"lora": {}},
            ),
        )


def test_a_layer_that_it_does_not_have_is_refused(described):
    config = config_of(model={"lora": {"target_modules": ["query"]}})
    with pytest.raises(UnsupportedModelError, match=r"model\.lora does not fit this model: Target"):
        check_model(described, config)


def test_what_only_token_chunks_meet_is_no_reason_without_them(dynamic):
    check_model(dynamic, config_of(data={"sequence_length": 32, "packing": "isolated"}))
    with pytest.raises(
        UnsupportedModelError,
        match="^rollout.use_chunked_training: acme/mine cannot be trained token chunk by token chunk: .*rope of type dynamic "
        "depends on the length.* With auto long sequences are trained whole",
    ):
        check_model(dynamic, config_of(rollout=CHUNKED))


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"data": {"packing": "isolated"}}, "MambaForCausalLM lets packed documents see each other"),
        ({"rollout": CHUNKED}, "token chunk by token chunk: mamba .* begin each token chunk anew"),
    ],
)
def test_states_that_go_on_into_the_next_document_are_found_on_a_small_model(tmp_path, sections, said):
    MambaConfig(vocab_size=50_000, hidden_size=4_096, num_hidden_layers=64).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=said):
        check_model(tmp_path, config_of(**sections))


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """Stores a directory, and returns its reference."""
    monkeypatch.setattr(datastore, "_active", ("local", str(tmp_path / ".metaflow")))
    monkeypatch.setenv("METAFLOW_HF_CACHE", str(tmp_path / "cache"))

    def store(directory: Path):
        task = {"flow": "F", "run": "1", "step": "merge", "task": "5"}
        return save_directory(configured_store(), directory, **task).to_json()

    return store


def test_a_run_looks_at_it_before_its_dataset_is_built(dynamic, stored):
    values = {
        # Its description alone is stored here.
        "model": {"repo_id": "acme/mine", "initialise": "random"},
        "data": {"dataset": "hf://acme/none", "sequence_length": 32},
        "rollout": CHUNKED,
    }
    reference = stored(dynamic)
    with pytest.raises(UnsupportedModelError, match="rope of type dynamic"):
        TrainingJob.configured(values, run="F-2").check_model(reference)
    values["rollout"] = {}
    TrainingJob.configured(values, run="F-2").check_model(reference)
    values["data"]["sequence_length"] = 1_000_000
    with pytest.raises(ConfigError, match=r"data\.sequence_length = 1,000,000 is more than"):
        TrainingJob.configured(values, run="F-2").check_model(reference)


def test_the_adapter_that_another_run_made_is_named_as_one(tmp_path, stored):
    made = tmp_path / "adapter"
    made.mkdir()
    (made / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "acme/base"}))
    (made / "adapter_model.safetensors").write_bytes(b"tensors")
    values = {"model": {"reference": "TrainFlow"}, "data": {"dataset": "hf://acme/none"}}
    with pytest.raises(
        UnsupportedModelError,
        match="TrainFlow is an adapter of acme/base, not a whole model.*lora.save: merged",
    ):
        TrainingJob.configured(values, run="F-2").check_model(stored(made))
