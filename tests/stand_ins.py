"""A hub with the repositories that the configurations name: tiny ones, with shapes and columns like the real ones."""

import json
import random

from metaflow_hf.demo import tiny_models, tiny_tokenizers
from metaflow_hf.demo.content import HubContent

MODELS = (
    "gpt2",
    "HuggingFaceTB/SmolLM2-135M",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "HuggingFaceTB/SmolLM2-1.7B",
    "unsloth/Llama-3.2-1B",
)
_WORDS = [
    "once",
    "upon",
    "a",
    "time",
    "there",
    "was",
    "little",
    "dog",
    "who",
    "saw",
    "big",
    "red",
    "ball",
    "and",
    "played",
    "with",
    "it",
    "all",
    "day",
    "long",
]
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def stories(seed: int, count: int) -> list[str]:
    dice = random.Random(seed)
    return [" ".join(dice.choices(_WORDS, k=dice.randint(8, 25))) for _ in range(count)]


def stand_in_hub(num_rows: int = 400) -> HubContent:
    """Everything that configs/*.yaml name, but what the embedded hub has."""
    content = HubContent()
    files = _model()
    for name in MODELS:
        chat = {"chat_template.jinja": _TEMPLATE.encode()} if name.endswith("Instruct") else {}
        content.add(name, {**files, **chat})
    content.add(
        "roneneldan/TinyStories",
        {
            "data/train-00000-of-00001.jsonl": _lines({"text": text} for text in stories(1, num_rows)),
            "data/validation-00000-of-00001.jsonl": _lines({"text": text} for text in stories(2, 40)),
        },
        repo_type="dataset",
    )
    content.add(
        "emozilla/pg19",
        {"data/train.jsonl": _lines({"text": text} for text in stories(6, num_rows))},
        repo_type="dataset",
    )
    content.add(
        "yahma/alpaca-cleaned",
        {"alpaca_data_cleaned.jsonl": _lines(_instruction(text) for text in stories(7, num_rows))},
        repo_type="dataset",
    )
    header = (
        "---\nconfigs:\n- config_name: all\n  default: true\n  data_files:\n  - split: train\n    path: all/train.jsonl\n"
        "- config_name: everyday-conversations\n  data_files:\n  - split: train\n    path: everyday/train.jsonl\n"
        "  - split: test\n    path: everyday/test.jsonl\n---\n"
    )
    content.add(
        "HuggingFaceTB/smoltalk",
        {
            "README.md": header.encode(),
            "all/train.jsonl": _lines({"messages": _talk(text)} for text in stories(3, 10)),
            "everyday/train.jsonl": _lines({"messages": _talk(text)} for text in stories(4, num_rows // 4)),
            "everyday/test.jsonl": _lines({"messages": _talk(text)} for text in stories(5, 20)),
        },
        repo_type="dataset",
    )
    return content


def _talk(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Say {text[:20]}"}, {"role": "assistant", "content": text}]


def _instruction(text: str) -> dict[str, str]:
    return {
        "instruction": f"Tell of {text[:10]}",
        "input": text[10:20] if len(text) % 2 else "",
        "output": text,
    }


def _lines(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _model() -> dict[str, bytes]:
    config = tiny_models.llama_config(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        max_positions=262_144,
    )
    return {
        "config.json": tiny_models.config_file(config),
        "model.safetensors": tiny_models.safetensors_file(tiny_models.llama_weights(config, 1)),
        **tiny_tokenizers.byte_level_bpe(stories(0, 60), 400),
        **tiny_tokenizers.bpe_config(262_144),
    }
