"""Tokens and labels beside those that TRL's own trainer prepares from the same rows."""

import copy
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from metaflow_hf.data import encode_examples
from metaflow_hf.demo import tiny_tokenizers

TEMPLATES = Path(find_spec("trl").origin).parent / "chat_templates"
WORDS = ["The sky is blue and so is the sea. Question: one, two; Answer: three hello there\n"] * 9


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    from transformers import AutoTokenizer

    directory = tmp_path_factory.mktemp("tokenizer")
    files = {**tiny_tokenizers.byte_level_bpe(WORDS, 400), **tiny_tokenizers.bpe_config(8192)}
    for name, data in files.items():
        (directory / name).write_bytes(data)
    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def prepared_by_trl():
    """Runs the trainer's own preparation, without a trainer."""
    from datasets import Dataset, disable_progress_bars
    from trl import SFTTrainer

    disable_progress_bars()

    def prepare(rows, tokenizer, **settings):
        config = SimpleNamespace(
            **{"assistant_only_loss": False, **settings},
            dataset_num_proc=None,
            dataset_text_field="text",
            max_length=None,
            shuffle_dataset=False,
        )
        trainer = SimpleNamespace(
            _tokenizer=tokenizer,
            chat_template=tokenizer.chat_template,
            completion_only_loss=True,
            _is_vlm=False,
        )
        found = SFTTrainer._prepare_dataset(
            trainer, Dataset.from_list(rows), tokenizer, config, False, None, "train"
        )
        return [(list(row["input_ids"]), list(row["labels"])) for row in found]

    return prepare


COMPLETIONS = [
    ("The sky is", " blue."),
    ("The sky is ", "blue."),
    ("The s", "ky is blue."),
    ("", "The sky"),
    ("Question: one\nAnswer:", " two\n"),
    ("größe 😀", "日本語 né"),
    ("😀", "😀"),
    ("The sky", "<|endoftext|>"),
    ("The sky", " is<|endoftext|>"),
    ("<|endoftext|>The sky", " is"),
    ("<|im_start|>user\nhi<|im_end|>", "<|im_start|>assistant\nho<|im_end|>"),
]


@pytest.mark.parametrize(("prompt", "completion"), COMPLETIONS)
def test_completions_are_tokens_of_one_text(prompt, completion, base, prepared_by_trl):
    row = {"prompt": prompt, "completion": completion}
    [(ids, labels)] = prepared_by_trl([row], base)
    [example] = encode_examples([row], base)
    assert list(example.input_ids) == ids
    assert list(example.labels) == labels


@pytest.mark.parametrize("text", ["The sky is blue.", "", "ends<|endoftext|>", "größe 😀", "  \n sky \n"])
def test_texts(text, base, prepared_by_trl):
    found = encode_examples([{"text": "sky"}, {"text": text}], base)[1:]
    if not text:
        assert found == []
        return
    [(ids, labels)] = prepared_by_trl([{"text": text}], base)
    assert (list(found[0].input_ids), list(found[0].labels)) == (ids, labels)


CONVERSATIONS = {
    "one turn": ([{"role": "user", "content": "sky?"}], [{"role": "assistant", "content": "blue"}]),
    "system": (
        [{"role": "system", "content": "be"}, {"role": "user", "content": "sky?"}],
        [{"role": "assistant", "content": "blue"}],
    ),
    "history": (
        [
            {"role": "user", "content": "sky?"},
            {"role": "assistant", "content": "blue"},
            {"role": "user", "content": "sea?"},
        ],
        [{"role": "assistant", "content": "blue and so is the sky"}],
    ),
}


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "phi3", "qwen3", "qwen3_instruct_2507"])
@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_completions_of_conversations(name, kind, base, prepared_by_trl):
    tokenizer = copy.deepcopy(base)
    if name != "chatml":
        tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text("utf-8")
    if (name, kind) == ("gemma", "system"):
        pytest.skip("the template refuses system prompts")
    prompt, completion = CONVERSATIONS[kind]
    row = {"prompt": prompt, "completion": completion}
    [(ids, labels)] = prepared_by_trl([row], tokenizer)
    [example] = encode_examples([row], tokenizer)
    # TRL leaves the end of the text to the template.
    assert list(example.input_ids) in (ids, [*ids, tokenizer.eos_token_id])
    assert list(example.labels)[: len(ids)] == labels


@pytest.mark.parametrize("turns", ["from", "role"])
def test_turns_of_both_kinds_are_those_of_chatml(turns, base, prepared_by_trl):
    tokenizer = copy.deepcopy(base)
    tokenizer.chat_template = (TEMPLATES / "qwen3_training.jinja").read_text("utf-8")
    keys = ("from", "value") if turns == "from" else ("role", "content")
    said = [("user", "sky?"), ("assistant", "blue"), ("user", "sea?"), ("assistant", "blue too")]
    messages = [dict(zip(keys, turn, strict=True)) for turn in said]
    name = "conversations" if turns == "from" else "messages"
    [(ids, labels)] = prepared_by_trl([{name: messages}], tokenizer, assistant_only_loss=True)
    [example] = encode_examples([{name: messages}], tokenizer)
    assert list(example.input_ids) in (ids, [*ids, tokenizer.eos_token_id])
    assert list(example.labels)[: len(ids)] == labels
