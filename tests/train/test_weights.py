"""Checkpoints that do not fit, are not complete, or are damaged: each is found before anything is trained, by one line."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from metaflow_hf.config import ModelConfig, TrainConfig
from metaflow_hf.errors import UnsupportedModelError
from metaflow_hf.train import weight_check
from metaflow_hf.train.models import load_model, load_tokenizer, prepare
from metaflow_hf.train.suitability import check_model
from metaflow_hf.train.weight_files import DirectoryFiles

SHAPE = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDE = {**SHAPE, "intermediate_size": 48}
GROUPED = {**WIDE, "num_key_value_heads": 1}
FAMILIES = {
    "llama": ("LlamaConfig", WIDE),
    "llama-tied": ("LlamaConfig", {**WIDE, "tie_word_embeddings": True}),
    "gpt2": ("GPT2Config", {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 2}),
    "gpt2-untied": (
        "GPT2Config",
        {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 2, "tie_word_embeddings": False},
    ),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 16}),
    "gemma2": ("Gemma2Config", {**GROUPED, "head_dim": 16}),
    "gemma3": ("Gemma3TextConfig", {**GROUPED, "head_dim": 16}),
    "gpt_neox": ("GPTNeoXConfig", WIDE),
    "mamba": ("MambaConfig", {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2}),
    "opt": ("OPTConfig", {**SHAPE, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "phi3": ("Phi3Config", {**WIDE, "pad_token_id": 0}),
    "mixtral": ("MixtralConfig", {**GROUPED, "num_local_experts": 2}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**GROUPED, "num_experts": 2, "moe_intermediate_size": 24, "head_dim": 16},
    ),
    "bloom": ("BloomConfig", {"vocab_size": 100, "hidden_size": 32, "n_layer": 2, "n_head": 2}),
    "falcon": ("FalconConfig", SHAPE),
}


def saved(family: str, directory: Path, **options) -> Path:
    kind, values = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**values))
    model.save_pretrained(directory, **options)
    return directory


def change(directory: Path, edit) -> None:
    """Rewrites the tensors of a whole checkpoint."""
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def planned(directory: Path, **model) -> None:
    config = TrainConfig.parse({"model": {"repo_id": "acme/mine", **model}, "data": {"sequence_length": 32}})
    check_model(directory, config, DirectoryFiles(directory))


def refused(directory: Path, said: str, **model) -> None:
    """The plan refuses it by its headers, and loading it in the same words."""
    config = ModelConfig(repo_id="acme/mine", **model)
    for look in (lambda: planned(directory, **model), lambda: load_model(directory, config)):
        with pytest.raises(UnsupportedModelError, match=said) as error:
            look()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}], ids=["whole", "sharded"])
def test_what_transformers_saves_is_no_false_alarm(family, options, tmp_path, caplog):
    directory = saved(family, tmp_path, **options)
    assert (directory / "model.safetensors.index.json").exists() == bool(options)
    with caplog.at_level(logging.INFO, "metaflow_hf"):
        planned(directory)
        load_model(directory, ModelConfig())
    assert not [record for record in caplog.records if record.name.startswith("metaflow_hf")]


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_that_do_not_make_the_model_are_named(family, tmp_path):
    directory = saved(family, tmp_path / "whole")
    names = [name for name in load_file(directory / "model.safetensors") if ".0." in name]
    inner = sorted(names)[len(names) // 2]

    def copy(name: str) -> Path:
        return shutil.copytree(directory, tmp_path / name)

    change(copy("missing"), lambda tensors: tensors.pop(inner))
    refused(tmp_path / "missing", r"^acme/mine lacks \d+ of the model's weights \(.*\): take a checkpoint")
    change(copy("shape"), lambda tensors: tensors.update({inner: torch.zeros([7] * tensors[inner].dim())}))
    refused(
        tmp_path / "shape", r"^\d+ of the tensors of acme/mine have other shapes than its config.json says"
    )
    change(
        copy("more"), lambda tensors: tensors.update({inner.replace(".0.", ".9."): tensors[inner].clone()})
    )
    refused(
        tmp_path / "more", r"^acme/mine holds 1 tensors that the model of its config.json has no place for"
    )


def test_a_head_that_is_missing_is_made_up_by_nobody(tmp_path):
    directory = saved("llama", tmp_path)
    change(directory, lambda tensors: tensors.pop("lm_head.weight"))
    refused(
        directory,
        r"lacks 1 of the model's weights \(lm_head.weight\): take a checkpoint with a language-model head",
    )


def test_a_vocabulary_of_another_size_is_found(tmp_path):
    directory = saved("qwen2", tmp_path)
    values = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**values, "vocab_size": 120}))
    refused(directory, r"lm_head.weight is \[100, 32\] in the checkpoint and \[120, 32\] by config.json")


def test_what_a_model_computes_itself_and_other_heads_are_no_reason(tmp_path, caplog):
    plain = saved("gpt2", tmp_path / "gpt2")

    def old(tensors):
        for layer in range(2):
            tensors[f"transformer.h.{layer}.attn.bias"] = torch.zeros(1, 1, 8, 8)
            tensors[f"transformer.h.{layer}.attn.masked_bias"] = torch.zeros(1)

    change(plain, old)
    planned(plain)
    load_model(plain, ModelConfig())
    assert not [record for record in caplog.records if record.name.startswith("metaflow_hf")]
    rewarded = saved("llama", tmp_path / "llama")
    change(rewarded, lambda tensors: tensors.update({"v_head.weight": torch.zeros(1, 32)}))
    planned(rewarded)
    assert "tensors outside of the language model are not used: v_head.weight" in caplog.text


def test_the_base_model_alone_has_no_prefix_and_passes(tmp_path):
    AutoModelForCausalLM.from_config(
        transformers.GPT2Config(**FAMILIES["gpt2"][1])
    ).transformer.save_pretrained(tmp_path)
    planned(tmp_path)
    load_model(tmp_path, ModelConfig())


def test_a_quantised_checkpoint_is_not_compared(tmp_path):
    directory = saved("llama", tmp_path)
    values = json.loads((directory / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (directory / "config.json").write_text(json.dumps(values))
    change(
        directory, lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.qweight": torch.ones(4, 4)})
    )
    planned(directory)


def test_integers_are_not_trained(tmp_path):
    model = load_model(saved("llama", tmp_path), ModelConfig())
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(
        UnsupportedModelError, match=r"acme/mine is quantised: 1 of its tensors \(lm_head.weight"
    ):
        prepare(model, ModelConfig(repo_id="acme/mine"))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-100]),
            "model.safetensors of acme/mine is not a complete safetensors file: it has",
        ),
        (
            lambda d: (d / "model.safetensors").write_text(
                "version https://git-lfs.github.com/spec/v1\noid sha256:1"
            ),
            "is not a complete safetensors file.*git lfs pull",
        ),
        (lambda d: (d / "model.safetensors").write_bytes(b""), "not a complete safetensors file"),
        (
            lambda d: (d / "model.safetensors").write_bytes((12).to_bytes(8, "little") + b'{"a": "torn"'),
            "its header is not readable",
        ),
        (lambda d: (d / "model.safetensors").unlink(), "acme/mine holds no weights that transformers loads"),
        (
            lambda d: (d / "model.safetensors").rename(d / "consolidated.safetensors"),
            "expected model.safetensors or .*, found consolidated.safetensors",
        ),
    ],
)
def test_a_damaged_file_is_named(damage, said, tmp_path):
    damage(saved("llama", tmp_path))
    refused(tmp_path, said)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lambda index: index["weight_map"].update(other="model-00009.safetensors"),
            "1 of .* files are missing",
        ),
        (lambda index: index.pop("weight_map"), "is not readable as the index of a checkpoint"),
    ],
)
def test_an_index_that_names_what_is_not_there_is_refused(damage, said, tmp_path):
    path = saved("llama", tmp_path, max_shard_size="20KB") / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    damage(index)
    path.write_text(json.dumps(index))
    refused(tmp_path, said)


def test_pickles_need_a_word_of_trust(tmp_path):
    directory = saved("llama", tmp_path)
    expected = load_model(directory, ModelConfig()).state_dict()
    torch.save(expected, directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    refused(
        directory,
        r"acme/mine has its weights only as pickle \(pytorch_model.bin\).*set model.allow_pickle: true",
    )
    planned(directory, allow_pickle=True)
    assert load_model(directory, ModelConfig(allow_pickle=True)).state_dict().keys() == expected.keys()


def test_other_safetensors_do_not_hide_a_pickle(tmp_path):
    directory = saved("llama", tmp_path)
    torch.save({}, directory / "pytorch_model.bin")
    (directory / "model.safetensors").rename(directory / "adapter_model.safetensors")
    refused(directory, "only as pickle")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_checkpoint_with_values_that_are_none_is_refused(value, training, tmp_path):
    training.model_dir = shutil.copytree(training.model_dir, tmp_path / "model")

    def edit(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value

    change(training.model_dir, edit)
    for model in ({}, {"lora": {"rank": 2}}):
        with pytest.raises(
            UnsupportedModelError,
            match=r"1 of the tensors of model hold NaN or infinite values \(model.layers.1.mlp.up_proj.weight\): the "
            "checkpoint is damaged",
        ):
            training.start(model=model)
    assert not training.store.children("rounds")


def test_code_of_the_model_is_not_run_without_trust(tmp_path):
    directory = saved("llama", tmp_path)
    values = json.loads((directory / "config.json").read_text())
    own = {"auto_map": {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.Mine"}}
    (directory / "mine.py").write_text("raise SystemExit('it ran')")
    (directory / "config.json").write_text(json.dumps({**values, **own, "model_type": "mine"}))
    refused(
        directory,
        r"acme/mine needs Python code of its own \(mine.MineConfig, auto_map in its config.json\). Read it at one commit, then "
        "set model.trust_remote_code: true and model.revision to this commit's hash",
    )
    # What transformers knows itself needs no code of the model.
    (directory / "config.json").write_text(json.dumps({**values, **own}))
    planned(directory)
    (directory / "config.json").write_text(
        json.dumps(
            {
                **own,
                "model_type": "bert",
                "architectures": ["Mine"],
                "auto_map": {"AutoModelForCausalLM": "mine.M"},
            }
        )
    )
    with pytest.raises(UnsupportedModelError, match="acme/mine is (a Mine|loaded by Python code of its own)"):
        planned(directory)


def test_code_of_a_tokenizer_is_not_run_without_trust(model_dir, tmp_path):
    directory = shutil.copytree(model_dir, tmp_path / "mine")
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}})
    )
    (directory / "mine.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(
        UnsupportedModelError, match="the tokenizer of mine needs Python code of its own.*revision"
    ):
        load_tokenizer(directory)


def test_without_accelerate_the_plan_says_that_it_did_not_look(tmp_path, monkeypatch, caplog):
    directory = saved("llama", tmp_path)
    change(directory, lambda tensors: tensors.pop("lm_head.weight"))
    monkeypatch.setattr(weight_check, "find_spec", lambda _: None)
    planned(directory)
    assert (
        "compared with its config.json only when they are loaded: install the package accelerate"
        in caplog.text
    )
    with pytest.raises(UnsupportedModelError, match="lacks 1 of the model's weights"):
        load_model(directory, ModelConfig())
