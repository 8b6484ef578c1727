"""transformers, unchanged, loads every served model by its id; the weights are a standard initialisation."""

import io
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from metaflow_hf.demo import tiny_models, tiny_tokenizers
from metaflow_hf.demo.catalog import DATASET_ID, MODEL_ID, VOCAB_SIZE
from metaflow_hf_cli.fixtures import PICKLE_ONLY_ID
from metaflow_hf_cli.fixtures import models as fixture_models

MODELS = (
    MODEL_ID,
    "bert-base-uncased",
    "distilbert-base-uncased",
    "gpt2",
    "facebook/opt-350m",
    "microsoft/phi-2",
    "meta-llama/Llama-2-7b-hf",
    "meta-llama/Llama-2-13b-hf",
    "meta-llama/Llama-2-70b-hf",
    "bigcode/starcoder",
)
TEXT = "The quick brown fox jumps over the lazy dog."

LOAD = """
import json, sys
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
result = {}
for repo_id in sys.argv[2:]:
    is_causal = "CausalLM" in AutoConfig.from_pretrained(repo_id).architectures[0] or repo_id == "gpt2"
    auto = AutoModelForCausalLM if is_causal else AutoModel
    model, info = auto.from_pretrained(repo_id, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(repo_id)
    inputs = tokenizer(sys.argv[1], return_tensors="pt")
    with torch.no_grad():
        output = model(**inputs)[0]
    result[repo_id] = {
        "missing": sorted(info["missing_keys"]), "unexpected": sorted(info["unexpected_keys"]),
        "mismatched": sorted(map(str, info["mismatched_keys"])), "std": output.std().item(), "shape": list(output.shape),
        "is_fast": tokenizer.is_fast, "decoded": tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True),
        "special": [tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id],
    }
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def loaded(hub_server, tmp_path_factory):
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub_server.url,
        "HF_HOME": str(tmp_path_factory.mktemp("hf")),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("HF_TOKEN", None)
    command = [sys.executable, "-c", LOAD, TEXT, *MODELS]
    return json.loads(subprocess.check_output(command, env=environment, text=True).splitlines()[-1])


@pytest.mark.parametrize("repo_id", MODELS)
def test_every_weight_has_its_place(loaded, repo_id):
    found = loaded[repo_id]
    assert (found["missing"], found["unexpected"], found["mismatched"]) == ([], [], [])
    assert found["is_fast"]
    assert math.isfinite(found["std"])


@pytest.mark.parametrize("repo_id", MODELS)
def test_text_survives_the_tokenizer(loaded, repo_id):
    decoded = loaded[repo_id]["decoded"]
    assert decoded == (TEXT.lower() if "bert" in repo_id else TEXT)


def test_logits_of_the_default_model_are_those_of_an_untrained_one(loaded):
    """Final norm gives unit variance, so logits have the standard deviation 0.02 * sqrt(hidden)."""
    assert loaded[MODEL_ID]["shape"][-1] == VOCAB_SIZE
    assert loaded[MODEL_ID]["std"] == pytest.approx(0.02 * math.sqrt(128), rel=0.1)
    assert loaded[MODEL_ID]["special"] == [0, 0, 1]


def test_weights_are_a_standard_initialisation():
    config = tiny_models.llama_config(vocab_size=VOCAB_SIZE)
    weights = tiny_models.llama_weights(config, seed=0)
    again, other = tiny_models.llama_weights(config, seed=0), tiny_models.llama_weights(config, seed=1)
    for name, weight in weights.items():
        assert np.array_equal(weight, again[name])
        if weight.ndim == 1:
            assert (weight == 1).all()
        else:
            drawn = weight[2:]  # the padding token's row of the embedding is zero
            assert abs(drawn.mean()) < 5 * 0.02 / math.sqrt(drawn.size)
            assert drawn.std() == pytest.approx(0.02, rel=0.03)
            assert not np.array_equal(weight, other[name])
    assert (weights["model.embed_tokens.weight"][1] == 0).all()


def test_shards_hold_every_weight_once():
    weights = tiny_models.llama_weights(tiny_models.llama_config(vocab_size=300), seed=0)
    files = tiny_models.sharded_files(weights, 3)
    index = json.loads(files["model.safetensors.index.json"])
    assert set(index["weight_map"]) == set(weights)
    assert set(index["weight_map"].values()) == {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    assert index["metadata"]["total_size"] == sum(w.nbytes for w in weights.values())


def test_pickled_weights_are_what_torch_reads(hub):
    torch = pytest.importorskip("torch")
    data = hub.content.repo(PICKLE_ONLY_ID).resolve().files["pytorch_model.bin"].data
    read = torch.load(io.BytesIO(data), weights_only=True)
    config = fixture_models.opt_config(vocab_size=512)
    expected = fixture_models.opt_weights(config, seed=7)
    assert set(read) == set(expected)
    assert all(np.array_equal(read[name].numpy(), weight) for name, weight in expected.items())


@pytest.fixture(scope="module")
def tokenizer(hub_server) -> Tokenizer:
    files = hub_server.content.repo(MODEL_ID).resolve().files
    return Tokenizer.from_str(files["tokenizer.json"].data.decode())


@settings(deadline=None)
@given(text=st.text(max_size=200))
def test_any_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_the_tokenizer_compresses_and_fills_its_vocabulary(tokenizer, hub):
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    text = "".join(tiny_tokenizers.BPE_SPECIAL_TOKENS)
    assert tokenizer.encode(text).ids == [0, 1, 2, 3]
    files = hub.content.repo(DATASET_ID, repo_type="dataset").resolve().files
    held_out = "".join(
        json.loads(line)["text"] for line in files["data/test-00000-of-00001.jsonl"].data.splitlines()
    )
    assert len(held_out.encode()) / len(tokenizer.encode(held_out).ids) > 2.4
