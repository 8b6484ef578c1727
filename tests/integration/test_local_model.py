"""A model in a local directory: stored once by the first step, and used from the datastore ever after."""

import json
import shutil
from pathlib import Path

import pytest

from metaflow_hf.demo import tiny_models, tiny_tokenizers

from .conftest import ROOT, Shell

FLOW = ROOT / "flows" / "train_flow.py"
RUN = ("run", "--repo_id", "./my model", "--num_gpus", "1", "--max_tokens", "4000")


def make_model(directory: Path) -> None:
    (directory / "checkpoint-10").mkdir(parents=True)
    config = tiny_models.llama_config(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2, num_kv_heads=1
    )
    files = {
        "config.json": tiny_models.config_file(config),
        "model.safetensors": tiny_models.safetensors_file(tiny_models.llama_weights(config, 1)),
        **tiny_tokenizers.byte_level_bpe(["the quick brown fox"] * 50, 300),
        **tiny_tokenizers.bpe_config(2048),
        "optimizer.pt": b"not wanted",
        "trainer_state.json": b"{}",
        "checkpoint-10/model.safetensors": b"not wanted",
    }
    for name, data in files.items():
        (directory / name).write_bytes(data)


@pytest.mark.timeout(1200)
def test_a_training_from_a_local_directory(shell: Shell):
    make_model(shell.directory / "my model")
    shell.succeed(FLOW, *RUN, timeout=500)
    # Later steps and resumed runs have no use for the directory any more.
    shutil.move(shell.directory / "my model", shell.directory / "elsewhere")
    found = json.loads(
        shell.succeed(
            "-c",
            "import json; from metaflow import Flow; d = Flow('TrainFlow').latest_run.data; "
            "print(json.dumps([d.base_model, d.model, d.job, d.plan.base_model]))",
        ).splitlines()[-1]
    )
    base, model, job, planned = found
    assert base["type"] == "model"
    assert base["label"] == "my model"
    assert base["pathspec"].split("/")[2] == "start"
    assert job["config"]["model"]["repo_id"] is None
    assert job["config"]["model"]["reference"] == base["key"] == planned
    names = {
        file["path"]
        for file in json.loads((shell.directory / ".metaflow/mf.hf" / base["key"]).read_text())["files"]
    }
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not names & {"optimizer.pt", "trainer_state.json", "checkpoint-10/model.safetensors"}
    for path in (shell.directory / ".metaflow/mf.hf").rglob("*.json"):
        assert str(shell.directory).encode() not in path.read_bytes(), path
    shell.succeed(FLOW, "resume", "merge", timeout=500)
    told = shell.succeed("-m", "metaflow.cmd.main_cli", "hf", "models", "show", model["key"], "--lineage")
    assert base["key"] in told
    assert str(shell.directory) not in told
