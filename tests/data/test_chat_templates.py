"""Every template that TRL ships, on conversations of every kind, against ``apply_chat_template`` itself.

TRL's ``*_training.jinja`` files mark what the assistant says; where they render the same text as the stock template,
labels must be the same token by token.
"""

import copy
from importlib.util import find_spec
from pathlib import Path

import pytest
from jinja2 import TemplateError

from metaflow_hf.data import encode_examples
from metaflow_hf.demo import tiny_tokenizers
from metaflow_hf.errors import BadRowError

TEMPLATES = Path(find_spec("trl").origin).parent / "chat_templates"
STOCK = sorted(path.stem for path in TEMPLATES.glob("*.jinja") if not path.stem.endswith("_training"))
SPECIAL = [
    *(
        "<|im_start|>",
        "<|im_end|>",
        "<think>",
        "</think>",
        "<|start|>",
        "<|end|>",
        "<|message|>",
        "<|channel|>",
    ),
    *(
        "<|return|>",
        "<|call|>",
        "<start_of_turn>",
        "<end_of_turn>",
        "<|user|>",
        "<|assistant|>",
        "<|observation|>",
    ),
    *(
        "<|eot_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<tool_call>",
        "</tool_call>",
        "[INST]",
        "[/INST]",
    ),
    *("<｜Assistant｜>", "<｜User｜>", "<|turn>", "<turn|>", "</s>"),
]
# They expect content as a list of parts.
OF_PARTS = {"idefics3", "llava_next", "smolvlm"}
# Their training templates put another text behind a turn, or render it otherwise.
OTHER_TEXT = {"glm4moe", "deepseek_r1_distill"}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def calling(arguments):
    return [{"type": "function", "function": {"name": "get_weather", "arguments": arguments}}]


SYSTEM = {"role": "system", "content": "Be brief."}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "description": "now", "parameters": CITY}}]
ANSWERED = {"role": "tool", "name": "get_weather", "content": "sunny"}
CONVERSATIONS = {
    "single": ([user("hi"), assistant("hello there")], None),
    "system": ([SYSTEM, user("hi"), assistant("hello there")], None),
    "multi-turn": ([user("hi"), assistant("hello there"), user("more"), assistant("yes sir")], None),
    "long": (
        [
            SYSTEM,
            user("hi"),
            assistant("one"),
            user("more"),
            assistant("two"),
            user("x y"),
            assistant("three"),
        ],
        None,
    ),
    "reasoning": ([user("hi"), assistant("answer", reasoning_content="think hard")], None),
    "thoughts in content": ([user("hi"), assistant("<think>\nthink hard\n</think>\n\nanswer")], None),
    "unicode": ([user("größe"), assistant("Straße — 日本語 né")], None),
    "empty user turn": ([user(""), assistant("hello there")], None),
    "parts": (
        [
            user([{"type": "text", "text": "hi"}]),
            assistant([{"type": "text", "text": "hello "}, {"type": "text", "text": "there"}]),
        ],
        None,
    ),
    "spaces": ([user(" hi "), assistant("  hello\n  there \n")], None),
    "tools": (
        [
            user("weather?"),
            assistant("", tool_calls=calling({"city": "Paris"})),
            ANSWERED,
            assistant("It is sunny."),
        ],
        TOOLS,
    ),
    "tools as JSON": (
        [
            user("weather?"),
            assistant(None, tool_calls=calling('{"city": "Paris"}')),
            ANSWERED,
            assistant("It is sunny."),
        ],
        TOOLS,
    ),
    "ends with the user": ([user("hi"), assistant("hello there"), user("thanks")], None),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    directory = tmp_path_factory.mktemp("tokenizer")
    words = "hello there, be brief and user hi assistant weather sunny Paris\n"
    files = {**tiny_tokenizers.byte_level_bpe([words] * 9, 320), **tiny_tokenizers.bpe_config(8192)}
    for name, data in files.items():
        (directory / name).write_bytes(data)
    found = AutoTokenizer.from_pretrained(directory)
    found.add_special_tokens({"additional_special_tokens": SPECIAL})
    found.bos_token = found.eos_token
    return found


def with_template(tokenizer, name):
    found = copy.deepcopy(tokenizer)
    found.chat_template = (TEMPLATES / f"{name}.jinja").read_text("utf-8")
    return found


def written(name, messages):
    """The messages in the form that everybody who calls the template by hand would choose."""
    found = []
    for message in messages:
        content = message["content"] or ""
        if not isinstance(content, str):
            content = "".join(part["text"] for part in content)
        if name.removesuffix("_training") in OF_PARTS:
            content = [{"type": "text", "text": content}]
        calls = {}
        if "tool_calls" in message:
            arguments = {"city": "Paris"}
            as_json = name in {"deepseekv3", "deepseek_r1_distill"}
            calls = {"tool_calls": calling('{"city": "Paris"}' if as_json else arguments)}
        found.append({**message, "content": content, **calls})
    return found


def last_run(mask):
    """Only the last run of ones: the last turn."""
    end = len(mask) - mask[::-1].index(1)
    start = next((i for i in range(end - 1, -1, -1) if not mask[i]), -1) + 1
    return [int(start <= i < end) for i in range(len(mask))]


def stock_refuses(name, tokenizer, messages, tools):
    """Whether the template raises, or leaves the call of a tool out."""
    try:
        text = tokenizer.apply_chat_template(written(name, messages), tools=tools, tokenize=False)
    except (TemplateError, TypeError):
        return True
    return tools is not None and not ("get_weather" in text.partition("weather?")[2] and "Paris" in text)


@pytest.mark.parametrize("name", STOCK)
def test_labels_are_those_of_the_marked_template(name, tokenizer):
    stock, end = with_template(tokenizer, name), tokenizer.eos_token_id
    is_marked = "{% generation" in stock.chat_template or "{%- generation" in stock.chat_template
    marked = (
        name if is_marked else f"{name}_training" if (TEMPLATES / f"{name}_training.jinja").exists() else None
    )
    trained = with_template(tokenizer, marked) if marked else None
    compared = 0
    for kind, (messages, tools) in CONVERSATIONS.items():
        row = {"messages": messages, **({"tools": tools} if tools else {})}
        if stock_refuses(name, stock, messages, tools):
            with pytest.raises(BadRowError, match=r"row 0: the model's chat template (refuses|leaves out)"):
                encode_examples([row], stock)
            continue
        found = encode_examples([row], stock)
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        assert len(found) in (1, len(turns)), kind
        ends = [len(messages)] if len(found) == 1 else [number + 1 for number in turns]
        if len(found) == 1 and len(stock.decode(found[0].input_ids)) < len(
            stock.apply_chat_template(written(name, messages), tools=tools, tokenize=False)
        ):
            # What the user says after the only turn is not a part of it.
            ends = [turns[0] + 1]
        for example, stop in zip(found, ends, strict=True):
            # The tokens are the stock template's, and one end where it has none.
            expected = stock.apply_chat_template(written(name, messages[:stop]), tools=tools)["input_ids"]
            assert example.input_ids in (expected, [*expected, end]), kind
            ids = example.input_ids
            assert all(label in (token, -100) for token, label in zip(ids, example.labels, strict=True))
            added = len(ids) - len(expected)
            if added:
                assert stock.decode(expected).rstrip()[-len(stock.eos_token) :] != stock.eos_token, kind
                assert example.labels[-1] == (end if messages[stop - 1]["role"] == "assistant" else -100)
            said = stock.decode([label for label in example.labels if label != -100])
            for number in turns if len(found) == 1 else [stop - 1]:
                content = written("", [messages[number]])[0]["content"].strip()
                assert content.rpartition("</think>")[2].strip() in said, kind
            assert "hi" not in said.replace("think", ""), "what the user says is not learned"
            if trained is None:
                continue
            oracle = trained.apply_chat_template(
                written(marked, messages[:stop]),
                tools=tools,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
            if oracle["input_ids"] != expected or (kind == "unicode" and name == "diffusion_gemma"):
                # It renders another text: thoughts in all turns, or an end that the model's own template lacks.
                continue
            mask = oracle["assistant_masks"]
            mask = last_run(mask) if len(found) > 1 else mask
            labels = example.labels[: len(expected)]
            assert [int(label != -100) for label in labels] == mask, (kind, said)
            compared += 1
    if trained is not None and name not in OTHER_TEXT:
        assert compared >= 8, "else nothing was compared"
