"""Which models are trained, and how they are loaded."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from transformers import GPTNeoXConfig

from metaflow_hf.config import ModelConfig, TrainConfig
from metaflow_hf.demo import tiny_models
from metaflow_hf.errors import ConfigError, UnsupportedModelError
from metaflow_hf.train.description import check_length
from metaflow_hf.train.export import write_model
from metaflow_hf.train.lineage import Lineage
from metaflow_hf.train.models import (
    compute_dtype,
    declared_positions,
    known_positions,
    load_model,
    load_tokenizer,
    prepare,
    save_model,
    trained_parameters,
)
from metaflow_hf_cli.fixtures import models as fixture_models


def test_weights_are_read_in_fp32_and_tied_ones_are_trained_once(model_dir):
    model = prepare(load_model(model_dir, ModelConfig()), ModelConfig())
    parameters = trained_parameters(model)
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
    assert "model.embed_tokens.weight" in parameters
    assert "lm_head.weight" not in parameters


def test_random_weights_depend_on_the_seed_alone(model_dir):
    config = ModelConfig(initialise="random")
    first, second, other = (
        dict(load_model(model_dir, config, seed=seed).named_parameters()) for seed in (1, 1, 2)
    )
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(first[name], second[name])
    assert not torch.equal(first[name], other[name])


@pytest.mark.parametrize("architectures", [["BertForMaskedLM"], ["BertModel"], []])
def test_an_encoder_is_refused(tmp_path, architectures):
    config = {**fixture_models.bert_config(vocab_size=100), "architectures": architectures}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="only causal language models"):
        load_model(tmp_path, ModelConfig(initialise="random"))


@pytest.mark.parametrize("is_decoder", [False, True])
def test_a_decoder_that_does_not_call_itself_one_is_trained(tmp_path, is_decoder):
    """GPT-NeoX (Pythia) is a decoder whatever its ``is_decoder`` says."""
    config = GPTNeoXConfig(vocab_size=50_000, hidden_size=512, is_decoder=is_decoder)
    config.architectures = ["GPTNeoXForCausalLM"]
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        assert load_model(tmp_path, ModelConfig(), initialise=True)


def test_a_directory_without_a_model_or_tokenizer_is_refused(tmp_path, model_dir):
    with pytest.raises(UnsupportedModelError, match="no model that transformers knows"):
        load_model(tmp_path, ModelConfig())
    shutil.copy(model_dir / "config.json", tmp_path)
    with pytest.raises(UnsupportedModelError, match="holds no weights"):
        load_model(tmp_path, ModelConfig())
    with pytest.raises(UnsupportedModelError, match="no usable tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "acme/mine has no config.json, so it is no model of transformers"),
        ('{"model_type":', "the config.json of acme/mine is not readable as JSON: Expecting value"),
        ("[]", "the config.json of acme/mine holds no settings"),
    ],
)
def test_a_model_that_says_nothing_about_itself_is_refused(tmp_path, text, said):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UnsupportedModelError, match=said):
        check_length(tmp_path, TrainConfig.parse({"model": {"repo_id": "acme/mine"}}))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"num_attention_heads": 3},
            "hidden size (32) is not a multiple of the number of attention heads (3).",
        ),
        ({"hidden_size": "big"}, "Field 'hidden_size' expected int, got str (value: 'big')."),
    ],
)
def test_a_shape_that_no_model_has_is_a_mistake_of_the_configuration(model_dir, values, said):
    config = ModelConfig(initialise="random", architecture=values)
    with pytest.raises(ConfigError) as error:
        load_model(model_dir, config)
    assert str(error.value).startswith("model.architecture: ")
    assert str(error.value).endswith(said)


def test_pickled_weights_are_read_only_when_that_is_allowed(tmp_path, model_dir):
    expected = load_model(model_dir, ModelConfig())
    shutil.copy(model_dir / "config.json", tmp_path)
    torch.save(expected.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsupportedModelError, match="allow_pickle"):
        load_model(tmp_path, ModelConfig())
    found = load_model(tmp_path, ModelConfig(allow_pickle=True))
    for name, value in expected.named_parameters():
        assert torch.equal(found.get_parameter(name), value)


def test_only_adapters_are_trained_with_lora(model_dir):
    config = ModelConfig.model_validate({"lora": {"rank": 4}})
    parameters = trained_parameters(prepare(load_model(model_dir, config), config, seed=3))
    assert parameters
    assert all("lora_" in name for name in parameters)
    again = trained_parameters(prepare(load_model(model_dir, config), config, seed=3))
    assert all(torch.equal(again[name], value) for name, value in parameters.items())


def test_a_decoder_of_another_family_is_taken(tmp_path):
    config = fixture_models.gpt2_config(vocab_size=100)
    (tmp_path / "config.json").write_bytes(tiny_models.config_file(config))
    assert trained_parameters(load_model(tmp_path, ModelConfig(initialise="random")))


@pytest.mark.parametrize("written", [77, None])
def test_the_positions_of_a_model_are_known_before_it_is_loaded(tmp_path, written):
    """GPT-2 calls them `n_positions`; where they are not written down, the architecture's own number counts."""
    values = {**fixture_models.gpt2_config(vocab_size=100), "n_positions": written}
    values = {name: value for name, value in values.items() if value is not None}
    (tmp_path / "config.json").write_bytes(tiny_models.config_file(values))
    settings = ModelConfig(initialise="random")
    assert declared_positions(tmp_path, settings) == (written or 1024)
    assert known_positions(load_model(tmp_path, settings)) == (written or 1024)


def test_a_checkpoint_that_lacks_weights_is_refused_by_name(model_dir, tmp_path):
    from safetensors.numpy import load_file, save_file

    shutil.copytree(model_dir, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"lacks 1 .*model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(tmp_path / "model", ModelConfig())


@pytest.mark.parametrize(("major", "expected"), [(7, torch.float32), (8, torch.bfloat16)])
def test_bf16_in_software_is_not_taken_for_that_of_a_gpu(monkeypatch, major, expected):
    """torch emulates it on a T4 or V100, slower than fp32."""
    facts = type("Properties", (), {"major": major})()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: facts)
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda _: True)
    assert compute_dtype(ModelConfig(), torch.device("cuda")) == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "BF16"),
        ({"dtype": "float32"}, "F32"),
        ({"lora": {"rank": 2}}, "BF16"),
        ({"initialise": "random"}, "F32"),
    ],
)
def test_a_model_comes_out_in_the_dtype_that_it_came_in(training, tmp_path, settings, expected):
    original = tmp_path / "original"
    save_model(load_model(training.model_dir, ModelConfig()).to(torch.bfloat16), original)
    load_tokenizer(training.model_dir).save_pretrained(original)
    training.model_dir = original
    training.start(model=settings)
    lineage = Lineage(training.store)
    write_model(lineage, lineage.newest().manifest.weights, original, training.config, tmp_path / "exported")
    with safe_open(tmp_path / "exported" / "model.safetensors", framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {expected}  # noqa: SIM118
