"""What cannot be rolled out exactly is refused by name, and the probe says so without raising."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from metaflow_hf.errors import UnsupportedModelError
from metaflow_hf.rollout import RolloutReport, chunked_segment_rollout, probe_model

_SMALL = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2}


def _build(auto_class, family, **configuration):
    import transformers

    config = transformers.AutoConfig.for_model(family, **{**_SMALL, **configuration})
    return getattr(transformers, auto_class).from_config(config)


CASES = {
    "mamba": (
        lambda: _build("AutoModelForCausalLM", "mamba", state_size=4, expand=1),
        "begin each token chunk anew",
    ),
    "rwkv": (lambda: _build("AutoModelForCausalLM", "rwkv", attention_hidden_size=32), "rwkv"),
    "recurrent_gemma": (
        lambda: _build(
            "AutoModelForCausalLM", "recurrent_gemma", num_attention_heads=2, intermediate_size=48
        ),
        "recurrent_gemma",
    ),
    "jamba": (
        lambda: _build(
            "AutoModelForCausalLM",
            "jamba",
            num_attention_heads=2,
            num_key_value_heads=2,
            use_mamba_kernels=False,
        ),
        "LinearAttention",
    ),
    "t5": (
        lambda: _build("AutoModelForSeq2SeqLM", "t5", d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2),
        "encoder-decoder",
    ),
    "bert": (
        lambda: _build("AutoModelForMaskedLM", "bert", num_attention_heads=2, intermediate_size=32),
        "bidirectional",
    ),
    "xlnet": (
        lambda: _build("AutoModelForCausalLM", "xlnet", d_model=32, n_layer=2, n_head=2, d_inner=32),
        "xlnet",
    ),
    "openai-gpt": (
        lambda: _build("AutoModelForCausalLM", "openai-gpt", n_embd=32, n_layer=2, n_head=2),
        "openai-gpt",
    ),
    "classifier": (
        lambda: _build(
            "AutoModelForSequenceClassification",
            "llama",
            num_attention_heads=2,
            intermediate_size=32,
            pad_token_id=0,
        ),
        "no language-model head",
    ),
    "wrapper": (lambda: nn.DataParallel(nn.Linear(4, 4)), "DataParallel: its parameters are gathered"),
    "plain module": (lambda: nn.Linear(4, 4), "Linear is neither"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_model_that_would_come_out_wrong_is_refused_by_name(name, tokens):
    build, reason = CASES[name]
    model = build()
    report = probe_model(model)
    assert (report.exact, report.truncated) == (False, False)
    assert reason in report.reasons[0]
    with pytest.raises(UnsupportedModelError, match=reason):
        chunked_segment_rollout(model, {"input_ids": tokens(1, 20)}, chunk_size=8)


def test_router_loss_is_refused(make_model, tokens):
    model = make_model("qwen2_moe", output_router_logits=True)
    with pytest.raises(UnsupportedModelError, match="router"):
        chunked_segment_rollout(model, {"input_ids": tokens()})


def test_router_loss_switched_on_after_the_probe_is_refused(make_model, tokens):
    model = make_model("qwen2_moe")
    chunked_segment_rollout(model, {"input_ids": tokens()}, chunk_size=8)
    model.config.output_router_logits = True
    with pytest.raises(UnsupportedModelError, match="router"):
        chunked_segment_rollout(model, {"input_ids": tokens()}, chunk_size=8)


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_rope_that_depends_on_the_length_is_refused(rope, make_model, tokens):
    parameters = {
        "rope_type": rope,
        "rope_theta": 10000.0,
        "factor": 2.0,
        "original_max_position_embeddings": 128,
    }
    if rope == "longrope":
        parameters |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    model = make_model("llama", rope_parameters=parameters)
    with pytest.raises(UnsupportedModelError, match=rope):
        chunked_segment_rollout(model, {"input_ids": tokens()})


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_virtual_tokens_are_refused(make_model, tokens):
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(make_model(), config)
    with pytest.raises(UnsupportedModelError, match="PromptTuningConfig: virtual tokens"):
        chunked_segment_rollout(model, {"input_ids": tokens()})


def test_eager_left_padding_that_would_see_the_future_is_refused(make_model, tokens):
    ids = tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    model = make_model(_attn_implementation="eager")
    with pytest.raises(UnsupportedModelError, match="row 1 has a label on its first token"):
        chunked_segment_rollout(model, {"input_ids": ids, "attention_mask": mask}, chunk_size=8)


class Bidirectional(nn.Module):
    """Adds the mean of all tokens to each one: what a future token says is known to all."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states, **kwargs):
        return self.layer(hidden_states + hidden_states.mean(1, keepdim=True), **kwargs)


class Forgetful(nn.Module):
    """Forgets the first three tokens as soon as there is a past."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states, past_key_values=None, **kwargs):
        if past_key_values is not None and past_key_values.get_seq_length() > 0:
            past_key_values = _Half(past_key_values)
        return self.attention(hidden_states, past_key_values=past_key_values, **kwargs)


class _Half:
    def __init__(self, cache):
        self._cache = cache

    def update(self, keys, values, layer_idx):
        keys, values = self._cache.update(keys, values, layer_idx)
        return keys, torch.cat([values[:, :, :3] * 0, values[:, :, 3:]], 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_probe_finds_what_no_configuration_tells(dtype, make_model):
    model = make_model(dtype=dtype, attention_bias=True)
    assert probe_model(model).exact

    model.model.layers[1].self_attn = Forgetful(model.model.layers[1].self_attn)
    report = probe_model(model, refresh=True)
    assert not report.exact
    assert "differ from those of one pass" in report.reasons[0]

    model = make_model(dtype=dtype, attention_bias=True)
    model.model.layers[1] = Bidirectional(model.model.layers[1])
    report = probe_model(model, refresh=True)
    assert "bidirectional" in report.reasons[0]
    probe_model(make_model(dtype=dtype, attention_bias=True), refresh=True)


def test_the_probe_disturbs_nothing(make_model, tokens):
    model = make_model("gpt2", attn_pdrop=0.3)
    model.transformer.h[0].eval()
    model.transformer.wpe.requires_grad_(False)
    chunked_segment_rollout(model, {"input_ids": tokens()}, chunk_size=8, backward=True)
    before = _everything(model)

    report = probe_model(model, refresh=True)

    assert report == RolloutReport(True, True, (), True, linear_head=True, bytes_per_token=3 * 2 * 32 * 8 * 2)
    after = _everything(model)
    assert before[0] == after[0]
    assert all(torch.equal(a, b) for a, b in zip(before[1], after[1], strict=True))


def test_the_probe_runs_once_per_configuration(make_model, monkeypatch):
    from metaflow_hf.rollout.trial import Trial

    runs = []
    original = Trial.report
    monkeypatch.setattr(Trial, "report", lambda self: (runs.append(1), original(self))[1])
    for _ in range(2):
        probe_model(make_model("llama", rms_norm_eps=2e-6))
    probe_model(make_model("llama", rms_norm_eps=3e-6))
    assert len(runs) == 2


def test_a_model_whose_logits_a_hook_changes_is_tried_anew(make_model):
    model = make_model()
    assert probe_model(model).linear_head

    def halved(_module, _args, output):
        output.logits = output.logits / 2
        return output

    handle = model.register_forward_hook(halved)
    assert not probe_model(model).linear_head
    handle.remove()
    assert probe_model(model).linear_head


def test_heads_that_scale_or_cap_are_told_from_plain_ones(make_model):
    plain = {family: probe_model(make_model(family)).linear_head for family in ("llama", "gpt2", "qwen2_moe")}
    changed = {
        family: probe_model(make_model(family)).linear_head for family in ("granite", "cohere", "gemma2")
    }
    assert all(plain.values())
    assert not any(changed.values())


def test_packed_documents_that_are_unclear_are_refused(make_model, tokens):
    ids = tokens(1, 20)
    mask = torch.ones_like(ids)
    mask[0, 14:16] = 0
    positions = torch.cat([torch.arange(12), torch.arange(8)])[None]
    batch = {"input_ids": ids, "position_ids": positions, "attention_mask": mask, "labels": ids}
    with pytest.raises(UnsupportedModelError, match="row 0 has a label that only padding could predict"):
        chunked_segment_rollout(make_model(), batch, chunk_size=8)
    batch["labels"] = ids.masked_fill(mask == 0, -100)
    batch["labels"][0, 16] = -100
    with pytest.raises(UnsupportedModelError, match="row 0 has padding inside a document"):
        chunked_segment_rollout(make_model(), batch, chunk_size=8)


def test_importing_the_package_loads_neither_torch_nor_transformers():
    code = "import sys, metaflow_hf.rollout; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def _everything(model):
    flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    tensors = [torch.get_rng_state(), *model.buffers(), *(p for p in model.parameters())]
    tensors += [p.grad for p in model.parameters() if p.grad is not None]
    return (flags, model.config.to_json_string()), [t.detach().clone() for t in tensors]
