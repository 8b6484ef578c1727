"""Where generation of a trained model begins and ends: config.json, generation_config.json and tokenizer agree."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from metaflow_hf.data import build_blocks
from metaflow_hf.errors import ConfigError
from metaflow_hf.store import open_store
from metaflow_hf.store.models import load_directory
from metaflow_hf.train import export_lineage, generate
from metaflow_hf.train.generation import prompt_tokens
from metaflow_hf.train.special_tokens import aligned_special_tokens

WORDS = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "a", "b", "c", "user", "assistant"]
UNK, BOS, EOS, PAD, START, TURN, A, B, C, USER, ASSISTANT = range(len(WORDS))
CHATML = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {{ m['content'] }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant{% endif %}"
)


def word_tokenizer(single: str = "$A", **special: str) -> PreTrainedTokenizerFast:
    """A token for each word; ``single`` is what it puts around a text."""
    inner = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    inner.post_processor = TemplateProcessing(single=single, special_tokens=[("<s>", BOS), ("</s>", EOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, additional_special_tokens=["<|im_start|>", "<|im_end|>"], **special
    )


FULL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


@pytest.mark.parametrize(
    ("special", "config", "generation", "ends", "expected"),
    [
        # The tokenizer has the last word.
        (FULL, {"eos_token_id": A, "bos_token_id": B, "pad_token_id": C}, {}, None, (EOS, BOS, PAD)),
        # Its ends are first, and ends that the model came with stay.
        (FULL, {"eos_token_id": TURN}, {"eos_token_id": [TURN]}, None, ([EOS, TURN], BOS, PAD)),
        (FULL, {"eos_token_id": EOS}, {"eos_token_id": EOS}, (TURN, EOS), ([TURN, EOS], BOS, PAD)),
        # What an untrained configuration says by default is a word here.
        (
            {"eos_token": "</s>"},
            {"eos_token_id": A, "bos_token_id": B},
            {"eos_token_id": A},
            None,
            (EOS, None, None),
        ),
        # A token that is special, though not by this name, stays.
        ({"eos_token": "</s>"}, {"bos_token_id": START, "pad_token_id": TURN}, {}, None, (EOS, START, TURN)),
        # A model without any.
        ({}, {"eos_token_id": A}, {"eos_token_id": B}, None, (None, None, None)),
        ({}, {}, {}, (C,), (C, None, None)),
        # No embedding for it.
        (FULL, {"vocab_size": 3}, {}, None, (EOS, BOS, None)),
    ],
)
def test_ids_that_agree(special, config, generation, ends, expected):
    settings = SimpleNamespace(**{"vocab_size": len(WORDS), "eos_token_id": None} | config)
    before = dict(vars(settings))
    found = aligned_special_tokens(
        settings, SimpleNamespace(**generation), word_tokenizer(**special), end_token_ids=ends
    )
    assert (found.eos_token_id, found.bos_id, found.pad_id) == expected
    assert vars(settings) == before


def test_it_agrees_with_the_trainer_of_transformers():
    """Where both have an opinion: a new end of sequence, and one more that the checkpoint knows."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.trainer_utils import align_special_tokens

    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=[TURN])
    tokenizer = word_tokenizer(**FULL)
    found = aligned_special_tokens(config, model.generation_config, tokenizer)
    align_special_tokens(model, tokenizer)
    assert (model.generation_config.eos_token_id, model.config.bos_token_id) == ([EOS, TURN], BOS)
    assert (found.eos_token_id, found.bos_id, found.pad_id) == ([EOS, TURN], BOS, PAD)


@pytest.fixture
def export(training, tmp_path, monkeypatch):
    """A trained and exported model as a directory; ``edit`` changes what it begins with."""
    monkeypatch.setenv("METAFLOW_HF_CACHE", str(tmp_path / "node-cache"))

    def run(edit=lambda directory: None, **options) -> Path:
        training.model_dir = shutil.copytree(training.model_dir, tmp_path / "base")
        edit(training.model_dir)
        training.start(data={"epochs": 3}, rounds={"seconds": 0.3})
        training.work()
        task = {"flow": "F", "run": "1", "step": "merge", "task": "5"}
        models = open_store(tmp_path / "models")
        saved = export_lineage(
            store=training.store,
            models=models,
            model_dir=training.model_dir,
            config=training.config,
            **task,
            **options,
        )
        return load_directory(models, saved, tmp_path / "out")

    return run


def update(directory: Path, name: str, **values) -> None:
    path = directory / name
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | values))


def test_an_export_stops_where_its_documents_ended(export):
    """The base model's configuration says other tokens than its tokenizer, as after an end of turn was added."""

    def edit(directory: Path) -> None:
        update(directory, "config.json", eos_token_id=77, bos_token_id=78, pad_token_id=79)
        update(directory, "generation_config.json", eos_token_id=77, temperature=0.5, do_sample=True)

    directory = export(edit)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    config = AutoConfig.from_pretrained(directory)
    generation = GenerationConfig.from_pretrained(directory)
    assert tokenizer.eos_token_id not in (None, 77)
    assert config.eos_token_id == generation.eos_token_id == tokenizer.eos_token_id
    assert config.bos_token_id == generation.bos_token_id == tokenizer.bos_token_id
    assert config.pad_token_id == generation.pad_token_id == tokenizer.pad_token_id
    assert generation.temperature == 0.5, "the rest of the generation configuration stays"
    # Plain transformers stops at it, and so do we.
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size)
    torch.nn.init.zeros_(head.weight)
    head.bias.data = torch.nn.functional.one_hot(
        torch.tensor(tokenizer.eos_token_id), head.out_features
    ).float()
    model.lm_head = head
    ids = torch.tensor([tokenizer("the list")["input_ids"]])
    assert model.generate(ids, do_sample=False, max_new_tokens=9).shape[1] == ids.shape[1] + 1
    assert generate(model, ["the list"], tokenizer, temperature=0, max_new_tokens=9) == [""]


def test_the_end_of_a_turn_stops_a_model_of_conversations(export, training, tmp_path):
    rows = [
        {
            "messages": [
                {"role": "user", "content": "the name"},
                {"role": "assistant", "content": f"of {word}"},
            ]
        }
        for word in ("a file", "a list", "a value", "the file", "the list", "the value")
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    training.dataset_dir = tmp_path / "chats"
    build_blocks(tmp_path / "chats.jsonl", training.dataset_dir)
    directory = export()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert GenerationConfig.from_pretrained(directory).eos_token_id == ends
    assert AutoConfig.from_pretrained(directory).eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("around", "prompt", "expected"),
    [
        ("$A", "a b", [A, B]),
        ("<s> $A", "a b", [BOS, A, B]),
        ("<s> $A </s>", "a b", [BOS, A, B]),
        ("$A </s>", "a b", [A, B]),
        ("<s> $A", "<s> a b", [BOS, A, B]),
        ("<s> $A", "<s><s> a b", [BOS, A, B]),
        ("$A", "a </s>", [A, EOS]),
        ("<s> $A </s>", "", [BOS]),
        ("$A", "", [BOS]),
        ("<s> $A </s>", [{"role": "user", "content": "a b"}], [START, USER, A, B, TURN, START, ASSISTANT]),
    ],
)
def test_a_prompt_has_one_beginning_and_no_end(around, prompt, expected):
    tokenizer = word_tokenizer(around, **FULL)
    tokenizer.chat_template = CHATML
    assert prompt_tokens(prompt, tokenizer) == expected


def test_a_template_that_writes_the_beginning_gets_no_second_one():
    tokenizer = word_tokenizer("<s> $A", **FULL)
    tokenizer.chat_template = "<s> " + CHATML
    found = prompt_tokens([{"role": "user", "content": "a"}], tokenizer)
    assert found == [BOS, START, USER, A, TURN, START, ASSISTANT]


def test_messages_need_a_template_that_takes_them():
    tokenizer = word_tokenizer(**FULL)
    messages = [{"role": "user", "content": "a"}]
    with pytest.raises(ConfigError, match="needs a tokenizer with a chat template"):
        prompt_tokens(messages, tokenizer)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(
        ConfigError, match="chat template refuses the messages of a prompt: roles must alternate"
    ):
        prompt_tokens(messages, tokenizer)


def test_a_conversation_is_answered(model_dir):
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.chat_template = CHATML
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    [answer] = generate(model, [[{"role": "user", "content": "the list"}]], tokenizer, max_new_tokens=5)
    assert "the list" not in answer
