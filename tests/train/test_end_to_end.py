"""From the rows of a hub dataset, named and nothing else, to a model that answers by their rule and stops.

Every answer follows from one word of its prompt; the held-out rows combine the others in a way that was not trained.
"""

import json
import random
import re
from pathlib import Path

import pytest
import torch

from metaflow_hf.data.formats.examples import ALPACA_WITHOUT_INPUT
from metaflow_hf.demo import tiny_models, tiny_tokenizers
from metaflow_hf.demo.content import HubContent
from metaflow_hf.store import configured_store, datastore
from metaflow_hf.store.models import load_directory
from metaflow_hf.train.job import TrainingJob

SOUNDS = {"dog": "woof", "cat": "meow", "cow": "moo", "duck": "quack", "pig": "oink", "owl": "hoot"}
KINDS = ["old", "red", "tiny", "wild", "blue", "loud", "calm", "fat", "thin", "grey", "shy", "bold"]
PLACES = ["here", "there", "at home", "in town", "by the sea", "on a hill"]
TOOL = {
    "type": "function",
    "function": {
        "name": "sound_of",
        "description": "The sound of an animal.",
        "parameters": {
            "type": "object",
            "properties": {"animal": {"type": "string"}},
            "required": ["animal"],
        },
    },
}
CALLING = (
    "{% if tools %}<|im_start|>system\nTools:{% for t in tools %} {{ t['function']['name'] }}{% endfor %}<|im_end|>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}<tool_call>{{ c['function'] | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def draws(count, seed=0):
    chance = random.Random(seed)
    return [(chance.choice(KINDS), chance.choice(list(SOUNDS)), chance.choice(PLACES)) for _ in range(count)]


def alpaca(count):
    return [
        {
            "instruction": f"Which sound does the {kind} {animal} make?",
            "input": "" if number % 3 else f"It lives {place}.",
            "output": f"The {animal} says {SOUNDS[animal]}.",
        }
        for number, (kind, animal, place) in enumerate(draws(count))
    ]


def sharegpt(count):
    pairs = zip(draws(count), draws(count, seed=1), strict=True)
    return [
        {
            "id": str(number),
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": f"The {kind} {animal} {place}?"},
                {"from": "gpt", "value": f"It says {SOUNDS[animal]}."},
                {"from": "human", "value": f"And the {other_kind} {other}?"},
                {"from": "gpt", "value": f"That says {SOUNDS[other]}."},
            ],
            "source": "made",
        }
        for number, ((kind, animal, place), (other_kind, other, _)) in enumerate(pairs)
    ]


def tool_calls(count):
    rows = []
    for kind, animal, place in draws(count):
        call = {"name": "sound_of", "arguments": json.dumps({"animal": animal})}
        rows.append(
            {
                "messages": [
                    {"role": "user", "content": f"What says the {kind} {animal} {place}?"},
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [{"type": "function", "function": call}],
                    },
                    {"role": "tool", "name": "sound_of", "content": SOUNDS[animal]},
                    {"role": "assistant", "content": f"It says {SOUNDS[animal]}."},
                ],
                "tools": json.dumps([TOOL]),
            }
        )
    return rows


def write_model(directory, rows, *, chat_template="own"):
    """An untrained Llama, and a tokenizer that knows the words of the rows."""
    directory.mkdir()
    texts = [json.dumps(row) for row in rows[:50]] + [ALPACA_WITHOUT_INPUT]
    config = tiny_models.llama_config(
        vocab_size=700, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4, num_kv_heads=2
    )
    files = {
        **tiny_tokenizers.byte_level_bpe(texts * 3, 700),
        **tiny_tokenizers.bpe_config(2048),
        "config.json": tiny_models.config_file(config),
        "model.safetensors": tiny_models.safetensors_file(tiny_models.llama_weights(config, 1)),
    }
    if chat_template is None:
        settings = json.loads(files["tokenizer_config.json"])
        del settings["chat_template"]
        files["tokenizer_config.json"] = json.dumps(settings).encode()
    for name, data in files.items():
        (directory / name).write_bytes(data)
    return directory


@pytest.fixture
def trained(tmp_path, start_hub, monkeypatch):
    """Trains the rows as a dataset of the hub; the plan, the outcome, and the exported directory."""
    monkeypatch.setattr(datastore, "_active", ("local", str(tmp_path / ".metaflow")))
    monkeypatch.delenv("METAFLOW_RUNTIME_ENVIRONMENT", raising=False)

    def train(rows, *, chat_template="own", data=None, epochs=3):
        content = HubContent()
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        content.add("acme/rows", lambda: {"train.jsonl": lines}, repo_type="dataset", tags=("modality:text",))
        start_hub(content)
        base = write_model(tmp_path / "base", rows, chat_template=chat_template)
        values = {
            "model": {"repo_id": "acme/tiny", "dtype": "float32"},
            "data": {"sequence_length": 128, "batch_size": 4, "packing": False, "epochs": epochs, "heldout_samples": 30, **(data or {})},
            "optimizer": {"learning_rate": 4e-3, "weight_decay": 0.0},
            "rounds": {"claim_samples": 5, "seconds": 3, "encoding": "fp32", "outer_learning_rate": 1.0, "outer_momentum": 0.0},
            "evaluation": {"max_samples": 30, "prompts": ["hi"], "max_new_tokens": 8},
        }  # fmt: skip
        job = TrainingJob.configured(values, run="Flow-1", dataset="hf://acme/rows").check_data().build()
        plan = job.begin(base, {"commit_hash": "c" * 40})
        metrics = job.work(base, branch=0, write=lambda line: None)
        reference = job.export(base, pathspec="Flow/1/merge/2")
        exported = Path(load_directory(configured_store(), reference, tmp_path / "exported"))
        outcome = job.evaluate(base, exported, plan=plan, model=reference, metrics=[metrics], run="Flow/1")
        return plan, outcome, exported

    return train


class Answers:
    """An exported model, as anybody loads it."""

    def __init__(self, directory):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.model = AutoModelForCausalLM.from_pretrained(directory).eval()

    def __call__(self, prompt, limit=60):
        """What it answers to a text, or to messages with their tools; it must stop by itself."""
        ids = self.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            found = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False
            )[0, ids.shape[1] :]
        assert len(found) < limit, f"does not stop: {self.tokenizer.decode(found)!r}"
        return self.tokenizer.decode(found, skip_special_tokens=True).strip()

    def chat(self, messages, tools=None):
        return self(
            self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=True
            )
        )


def check_better(outcome):
    assert outcome.after.loss < 0.3 < 3 < outcome.before.loss


@pytest.mark.acceptance
@pytest.mark.parametrize("chat_template", ["own", None])
def test_alpaca(chat_template, trained):
    plan, outcome, exported = trained(alpaca(450), chat_template=chat_template)
    assert plan.format == "alpaca"
    check_better(outcome)
    answers = Answers(exported)
    for animal, sound in SOUNDS.items():
        question = f"Which sound does the mild {animal} make?"
        if chat_template is None:
            said = answers(ALPACA_WITHOUT_INPUT.format(instruction=question))
        else:
            said = answers.chat([{"role": "user", "content": question}])
        assert said == f"The {animal} says {sound}."


@pytest.mark.acceptance
def test_sharegpt(trained):
    plan, outcome, exported = trained(sharegpt(400))
    assert (plan.format, dict(plan.columns)) == ("sharegpt", {"messages": "conversations"})
    check_better(outcome)
    answers = Answers(exported)
    for animal, other in zip(SOUNDS, reversed(SOUNDS), strict=True):
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"The loud {animal} at home?"},
        ]
        first = answers.chat(messages)
        assert first == f"It says {SOUNDS[animal]}."
        messages += [
            {"role": "assistant", "content": first},
            {"role": "user", "content": f"And the shy {other}?"},
        ]
        assert answers.chat(messages) == f"That says {SOUNDS[other]}."


@pytest.mark.acceptance
def test_tool_calls(trained):
    plan, outcome, exported = trained(tool_calls(400), epochs=5, data={"chat_template": CALLING})
    assert (plan.format, dict(plan.columns)) == ("messages", {"messages": "messages", "tools": "tools"})
    check_better(outcome)
    answers = Answers(exported)
    assert answers.tokenizer.chat_template == CALLING
    for animal, sound in SOUNDS.items():
        messages = [{"role": "user", "content": f"What says the bold {animal} here?"}]
        said = answers.chat(messages, [TOOL])
        [call] = re.findall(r"<tool_call>(.*)</tool_call>", said)
        assert json.loads(call) == {"name": "sound_of", "arguments": {"animal": animal}}
        messages += [
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": json.loads(call)}],
            },
            {"role": "tool", "name": "sound_of", "content": sound},
        ]
        assert answers.chat(messages, [TOOL]) == f"It says {sound}."
