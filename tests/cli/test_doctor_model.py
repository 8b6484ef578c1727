"""``metaflow hf doctor --model``: exact, truncated only or refused, and what a token costs, from a configuration."""

import json
from pathlib import Path

import pytest
from metaflow._vendor.click.testing import CliRunner

from metaflow_hf_cli import doctor_model
from metaflow_hf_cli.group import hf

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131_072,
    "vocab_size": 128_256,
    "tie_word_embeddings": True,
}
PARAMETERS = 1_235_814_400
KEYS_AND_VALUES = 16 * 2 * 8 * 64 * 2  # layers, both, heads, head size, bf16


def call(*arguments: object, status: int = 0) -> str:
    done = CliRunner(mix_stderr=False).invoke(hf, ["doctor", *map(str, arguments)])
    assert done.exit_code == status, done.stderr
    assert "Traceback" not in done.output
    return done.stdout if status == 0 else done.stderr


@pytest.fixture
def directory(tmp_path: Path):
    def write(**changes) -> Path:
        (tmp_path / "config.json").write_text(json.dumps(LLAMA | changes))
        return tmp_path

    return write


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(doctor_model, "_cards", lambda: list(doctor_model._CARDS))


def test_a_model_is_judged_and_measured_without_weights(directory):
    found = json.loads(call("--model", directory(), "--json"))
    assert (found["exact"], found["truncated"], found["reasons"]) == (True, True, [])
    assert found["parameters"] == PARAMETERS
    assert found["bytes_per_token"] == KEYS_AND_VALUES
    assert found["bytes_per_token_chunk"] == 0
    longest = found["longest"]["a GPU of 24 GiB"]
    rest = 24 * 2**30 - 16 * PARAMETERS
    assert 0.8 * rest / (2 * KEYS_AND_VALUES) < longest["exact"] < rest / (2 * KEYS_AND_VALUES)
    assert longest["truncated"] == 131_072, "no longer than the positions that it knows"
    lines = call("--model", directory()).splitlines()
    assert lines[1] == "gradients in token chunks: exact, or truncated"
    assert "carry in bfloat16: 64.0 KiB a token (exact), 32.0 KiB (truncated)" in lines
    assert lines[-1].split() == [
        "a",
        "GPU",
        "of",
        "141",
        "GiB",
        "131,072",
        "(all",
        "its",
        "positions)",
        "131,072",
        "(all",
        "its",
        "positions)",
    ]


def test_a_model_that_is_refused_says_why(directory):
    lines = call(
        "--model", directory(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    )
    assert "gradients in token chunks: refused" in lines
    assert "rope of type dynamic depends on the length" in lines


def test_weights_that_do_not_fit_are_told(directory):
    lines = call("--model", directory(num_hidden_layers=48, hidden_size=8192, num_attention_heads=128))
    assert "too small" in lines.splitlines()[-3]


def test_a_model_of_the_hub_needs_its_configuration_only(hub):
    assert "llama" in call("--model", "metaflow-hf/tiny-llama")


def test_what_transformers_does_not_know_is_one_line(directory):
    error = call("--model", directory(model_type="nobody-knows"), status=1)
    assert len(error.strip().splitlines()) == 1
    assert "this version of transformers does not know its configuration" in error
