"""Multimodal models are trained on text by their text part; what comes out is the whole model again."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMultimodalLM, AutoModelForSeq2SeqLM, T5Config
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from metaflow_hf.config import ModelConfig, TrainConfig
from metaflow_hf.errors import ConfigError, UnsupportedModelError
from metaflow_hf.store import open_store
from metaflow_hf.store.models import load_directory
from metaflow_hf.train import export_lineage, generate, text_part
from metaflow_hf.train.models import load_model, load_parts, trained_parameters
from metaflow_hf.train.suitability import check_model
from metaflow_hf.train.text_part import check_text_part
from metaflow_hf.train.weight_files import DirectoryFiles

TEXT = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
KINDS = {
    "gemma3": {
        "text_config": TEXT,
        "vision_config": {**VISION, "model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 1,
        "image_token_index": 299,
        "boi_token_index": 298,
        "eoi_token_index": 297,
    },
    "llava": {
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": {**VISION, "model_type": "clip_vision_model", "projection_dim": 16},
        "image_token_index": 299,
    },
    "mistral3": {
        "text_config": {**TEXT, "model_type": "mistral"},
        "vision_config": {**VISION, "model_type": "pixtral", "head_dim": 8},
        "image_token_index": 299,
    },
    "llama4": {
        "text_config": {
            **TEXT,
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "attention_chunk_size": 64,
        },
        "vision_config": {
            **VISION,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
        },
    },
    "qwen3_5": {
        "text_config": {
            **TEXT,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "depth": 1,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 14,
            "num_position_embeddings": 4,
        },
        "image_token_id": 299,
        "video_token_id": 298,
        "vision_start_token_id": 297,
        "vision_end_token_id": 296,
    },
}


def saved(kind: str, directory: Path, tokenizer_dir: Path, **changes) -> Path:
    """A tiny multimodal model as transformers saves it, with the tokenizer of ``tokenizer_dir``."""
    config = CONFIG_MAPPING[kind](**KINDS[kind] | changes)
    torch.manual_seed(0)
    model = AutoModelForMultimodalLM.from_config(config)
    for parameter in model.parameters():
        # Zeros and ones would hide what is not loaded.
        torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(directory)
    for path in tokenizer_dir.glob("*token*"):
        shutil.copy(path, directory)
    return directory


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_part_predicts_what_the_whole_model_predicts(kind, tmp_path, model_dir):
    directory = saved(kind, tmp_path / kind, model_dir)
    check_model(
        directory,
        TrainConfig.parse({"model": {"repo_id": "acme/eyes"}, "data": {"sequence_length": 32}}),
        DirectoryFiles(directory),
    )
    loaded = load_parts(directory, ModelConfig())
    assert loaded.whole is not loaded.language
    check_text_part(loaded.whole, loaded.language, kind)
    names = trained_parameters(loaded.language)
    assert not any("vision" in name or "projector" in name for name in names)
    # What transformers builds from the text configuration alone has the same weights.
    fresh = load_model(directory, ModelConfig(), initialise=True)
    assert {name: p.shape for name, p in fresh.named_parameters()} == {
        name: p.shape for name, p in names.items()
    }


@pytest.mark.parametrize(
    ("kind", "lora"), [("gemma3", None), ("llava", None), ("llama4", None), ("gemma3", {"rank": 2})]
)
def test_the_trained_model_is_the_whole_model_with_a_trained_text_part(
    kind, lora, tmp_path, model_dir, training, monkeypatch
):
    monkeypatch.setenv("METAFLOW_HF_CACHE", str(tmp_path / "node-cache"))
    training.model_dir = saved(kind, tmp_path / kind, model_dir)
    (training.model_dir / "preprocessor_config.json").write_text('{"image_processor_type": "Own"}')
    training.start(model={"lora": lora}, rounds={"max_tokens": 400})
    training.work()
    reference = export_lineage(
        store=training.store,
        models=open_store(tmp_path / "models"),
        model_dir=training.model_dir,
        config=training.config,
        flow="F",
        run="1",
        step="merge",
        task="5",
    )
    directory = load_directory(open_store(tmp_path / "models"), reference, tmp_path / "out")
    before, report = AutoModelForMultimodalLM.from_pretrained(training.model_dir, output_loading_info=True)
    after, report = AutoModelForMultimodalLM.from_pretrained(directory, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(after) is type(before)
    assert json.loads((directory / "config.json").read_text())["architectures"] == [type(before).__name__]
    is_text = re.compile(r"language_model|lm_head")
    changed = {
        name
        for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True)
        if not torch.equal(old, new)
    }
    assert changed
    assert all(is_text.search(name) for name in changed)
    assert (directory / "preprocessor_config.json").exists()
    assert len(generate(directory, ["the list"], max_new_tokens=4)) == 1
    # It can be trained further.
    assert load_parts(directory, ModelConfig()).whole is not None


def test_a_part_that_reads_a_text_in_another_way_is_refused(tmp_path, model_dir):
    loaded = load_parts(saved("llava", tmp_path / "llava", model_dir), ModelConfig())
    language = loaded.language
    language.lm_head = torch.nn.Linear(32, 300, bias=False)
    with pytest.raises(
        UnsupportedModelError, match="acme/eyes is a LlavaForConditionalGeneration that cannot"
    ):
        check_text_part(loaded.whole, language, "acme/eyes")


def test_weights_that_only_the_text_part_has_are_refused(tmp_path, model_dir, monkeypatch):
    whole = load_parts(saved("llava", tmp_path / "llava", model_dir), ModelConfig()).whole
    monkeypatch.setattr(whole, "get_output_embeddings", lambda: torch.nn.Linear(32, 300, bias=False))
    with pytest.raises(UnsupportedModelError, match="its language model has weights of its own"):
        text_part.text_part(whole, "acme/eyes")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"]},
            r"acme/eyes is a Qwen2_5_VLForConditionalGeneration, and transformers has no causal language model for its text "
            r"part \(Qwen2_5_VLTextConfig\).*Choose the text-generation model of this family",
        ),
        (
            {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
            "acme/eyes is a T5ForConditionalGeneration: only causal language models",
        ),
    ],
)
def test_what_has_no_causal_text_part_is_refused_by_its_config(tmp_path, config, said):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=said):
        check_model(
            tmp_path,
            TrainConfig.parse({"model": {"repo_id": "acme/eyes"}, "data": {"sequence_length": 32}}),
        )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"initialise": "random"}, "model.initialise: random makes a language model"),
        ({"lora": {"save": "adapter"}}, "set model.lora.save: merged"),
    ],
)
def test_settings_that_only_language_models_take_are_refused(tmp_path, model_dir, changes, said):
    directory = saved("llava", tmp_path / "llava", model_dir)
    config = TrainConfig.parse(
        {"model": {"repo_id": "acme/eyes", **changes}, "data": {"sequence_length": 32}}
    )
    with pytest.raises(ConfigError, match=said):
        check_model(directory, config)


def test_an_encoder_decoder_with_weights_is_refused(tmp_path):
    config = T5Config(vocab_size=100, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="T5ForConditionalGeneration: only causal language"):
        load_model(tmp_path, ModelConfig(repo_id="acme/t5"))
