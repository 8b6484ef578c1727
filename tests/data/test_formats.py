"""Rows as datasets of the hub have them: the format that is found, or the settings that decide; and what is learned."""

import datetime as dt
import json
import re
from pathlib import Path

import pytest

from metaflow_hf.data import detect_format, encode_examples, register_format
from metaflow_hf.data.formats import Conversation, PromptCompletion, Role, known_formats, registry
from metaflow_hf.data.formats.columns import TEXT
from metaflow_hf.data.formats.examples import RowProblem
from metaflow_hf.data.tokens import IGNORE_INDEX
from metaflow_hf.demo import tiny_tokenizers
from metaflow_hf.errors import BadRowError, FormatError

# A template that shows everything: tools, calls and content of every role.
TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}{{ c['function']['name'] }}({{ c['function']['arguments'] | tojson }}){% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WEATHER = {
    "name": "get_weather",
    "description": "now",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
TOOLS = [{"type": "function", "function": WEATHER}]
CALL = {"name": "get_weather", "arguments": {"city": "Paris"}}
SAID_CALL = 'get_weather({"city": "Paris"})'


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def human(value):
    return {"from": "human", "value": value}


def gpt(value, **more):
    return {"from": "gpt", "value": value, **more}


PAIR = [user("q"), assistant("a")]
TURNS = [human("q"), gpt("a")]
STACK = {"hexsha": "ab", "size": 10, "ext": "py", "lang": "Python", "max_stars_repo_path": "a/b.py"}
WEB = {"url": "http://x", "timestamp": dt.datetime(2019, 4, 25), "language_score": 0.9, "token_count": 9}
OPENHERMES = dict.fromkeys(["custom_instruction", "system_prompt", "model", "title", "idx"])


def padded(message):
    """As a table holds it: every key that any message has."""
    return {**dict.fromkeys(["tool_calls", "name", "tool_call_id", "weight"]), **message}


# Name -> (rows, format, its columns, what is learned of each example).
CERTAIN = {
    "alpaca": (
        [
            {"instruction": "Sort", "input": "b a", "output": "a b"},
            {"instruction": "Say", "input": "", "output": "hi"},
        ],
        "alpaca",
        {"instruction": "instruction", "input": "input", "output": "output"},
        ["a b", "hi"],
    ),
    "alpaca without input": (
        [{"instruction": "Say", "output": "hi"}],
        "alpaca",
        {"instruction": "instruction", "output": "output"},
        ["hi"],
    ),
    "alpaca with its rendering": (
        [{"instruction": "Sort", "input": "b", "output": "a b", "text": "### Sort\n### Response:\na b"}],
        "alpaca",
        {"instruction": "instruction", "input": "input", "output": "output"},
        ["a b"],
    ),
    "alpaca, nowhere an input": (
        [{"instruction": "Say", "input": None, "output": "hi"}],
        "alpaca",
        {"instruction": "instruction", "input": "input", "output": "output"},
        ["hi"],
    ),
    "alpaca with system and history": (
        [
            {
                "instruction": "Say",
                "input": "",
                "output": "hi",
                "system": "be",
                "history": [["old question", "old answer"]],
            }
        ],
        "alpaca",
        {
            "instruction": "instruction",
            "input": "input",
            "output": "output",
            "system": "system",
            "history": "history",
        },
        ["hi"],
    ),
    "code alpaca with a prompt": (
        [{"instruction": "Sort", "input": "b", "output": "a b", "prompt": "### Sort"}],
        "alpaca",
        {"instruction": "instruction", "input": "input", "output": "output"},
        ["a b"],
    ),
    "finetome": (
        [{"conversations": TURNS, "source": "infini", "score": 5.2}],
        "sharegpt",
        {"messages": "conversations"},
        ["a"],
    ),
    "sharegpt": ([{"id": "x", "conversations": TURNS}], "sharegpt", {"messages": "conversations"}, ["a"]),
    "openhermes": (
        [
            {
                **OPENHERMES,
                "conversations": [{**turn, "weight": None} for turn in TURNS],
                "source": "airoboros",
            }
        ],
        "sharegpt",
        {"messages": "conversations", "system": "system_prompt"},
        ["a"],
    ),
    "slimorca": (
        [
            {
                "conversations": [
                    {"from": "system", "value": "s", "weight": None},
                    {**human("q"), "weight": 0.0},
                    gpt("a", weight=1.0),
                ]
            }
        ],
        "sharegpt",
        {"messages": "conversations"},
        ["a"],
    ),
    "magpie": (
        [{"uuid": "x", "instruction": "q", "response": "a", "conversations": TURNS}],
        "sharegpt",
        {"messages": "conversations"},
        ["a"],
    ),
    "toolace": (
        [{"system": "you may call", "conversations": [{"from": "user", "value": "q"}, gpt("[f(x=1)]")]}],
        "sharegpt",
        {"messages": "conversations", "system": "system"},
        ["[f(x=1)]"],
    ),
    "glaive as sharegpt": (
        [
            {
                "conversations": [
                    human("weather?"),
                    {"from": "function_call", "value": json.dumps(CALL)},
                    {"from": "observation", "value": '{"t": 20}'},
                    gpt("20 degrees"),
                ],
                "tools": json.dumps([WEATHER]),
            }
        ],
        "sharegpt",
        {"messages": "conversations", "tools": "tools"},
        [f"{SAID_CALL}<|im_end|>\n20 degrees"],
    ),
    "function call that is not learned": (
        [
            {
                "conversations": [
                    human("weather?"),
                    {"from": "function_call", "value": json.dumps(CALL), "weight": 0},
                    {"from": "observation", "value": {"t": 20}},
                    gpt("20 degrees"),
                ],
                "tools": "[]",
            }
        ],
        "sharegpt",
        {"messages": "conversations", "tools": "tools"},
        ["20 degrees"],
    ),
    "hermes function calling": (
        [
            {
                "id": "1",
                "conversations": [
                    {"from": "system", "value": "tools"},
                    human("q"),
                    gpt("<tool_call>\n{}\n</tool_call>"),
                    {"from": "tool", "value": "<tool_response>x</tool_response>"},
                    gpt("a"),
                ],
                "category": "c",
                "tools": json.dumps(TOOLS),
            }
        ],
        "sharegpt",
        {"messages": "conversations", "tools": "tools"},
        ["<tool_call>\n{}\n</tool_call><|im_end|>\na"],
    ),
    "ultrachat 200k": (
        [{"prompt": "q", "prompt_id": "abc", "messages": PAIR}],
        "messages",
        {"messages": "messages"},
        ["a"],
    ),
    "smoltalk": (
        [{"messages": PAIR, "source": "magpie", "full_topic": "x"}],
        "messages",
        {"messages": "messages"},
        ["a"],
    ),
    "open-r1": (
        [
            {
                "problem": "p",
                "solution": "s",
                "answer": "42",
                "messages": [user("p"), assistant("<think>\nt\n</think>\n\ns")],
                "generations": ["g"],
            }
        ],
        "messages",
        {"messages": "messages"},
        ["<think>\nt\n</think>\n\ns"],
    ),
    "lmsys": (
        [
            {
                "conversation_id": "x",
                "model": "v",
                "conversation": PAIR,
                "openai_moderation": [{"flagged": False}],
            }
        ],
        "messages",
        {"messages": "conversation"},
        ["a"],
    ),
    "wildchat": (
        [{"conversation_hash": "x", "timestamp": WEB["timestamp"], "conversation": PAIR, "turn": 1}],
        "messages",
        {"messages": "conversation"},
        ["a"],
    ),
    "messages under another name": ([{"dialog": PAIR, "id": 1}], "messages", {"messages": "dialog"}, ["a"]),
    "roles in capitals": (
        [{"messages": [{"role": "User", "content": "q"}, {"role": "Assistant", "content": "a"}]}],
        "messages",
        {"messages": "messages"},
        ["a"],
    ),
    "openai fine-tuning": (
        [
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    user("q"),
                    assistant("old", weight=0),
                    user("more"),
                    assistant("new", weight=1),
                ]
            }
        ],
        "messages",
        {"messages": "messages"},
        ["new"],
    ),
    "openai tools": (
        [
            {
                "messages": [
                    user("q"),
                    {
                        "role": "assistant",
                        "tool_calls": [
                            {
                                "id": "c1",
                                "type": "function",
                                "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
                            }
                        ],
                    },
                ],
                "parallel_tool_calls": False,
                "tools": TOOLS,
            }
        ],
        "messages",
        {"messages": "messages", "tools": "tools"},
        [SAID_CALL],
    ),
    "messages as JSON": (
        [{"messages": json.dumps(PAIR), "tools": "[]"}],
        "messages",
        {"messages": "messages", "tools": "tools"},
        ["a"],
    ),
    "parts of content": (
        [
            {
                "messages": [
                    user([{"type": "text", "text": "q", "image": None}]),
                    assistant([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]),
                ]
            }
        ],
        "messages",
        {"messages": "messages"},
        ["ab"],
    ),
    "padded by a table": (
        [
            {
                "messages": [
                    padded(user("q")),
                    padded(
                        assistant(
                            None,
                            tool_calls=[
                                {"id": None, "function": {**CALL, "arguments": json.dumps(CALL["arguments"])}}
                            ],
                        )
                    ),
                    padded({"role": "tool", "content": "20", "name": "get_weather"}),
                    padded(assistant("a")),
                ],
                "tools": json.dumps(TOOLS),
            }
        ],
        "messages",
        {"messages": "messages", "tools": "tools"},
        [f"{SAID_CALL}<|im_end|>\na"],
    ),
    "calls as a JSON column": (
        [{"messages": [user("q"), assistant("", tool_calls=json.dumps([CALL]))], "tools": None}],
        "messages",
        {"messages": "messages", "tools": "tools"},
        [SAID_CALL],
    ),
    "tools, each as JSON": (
        [{"messages": PAIR, "tools": [json.dumps(TOOLS[0])]}],
        "messages",
        {"messages": "messages", "tools": "tools"},
        ["a"],
    ),
    "no messages first": (
        [{"messages": []}, {"messages": None}, {"messages": PAIR}],
        "messages",
        {"messages": "messages"},
        ["a"],
    ),
    "prompt and completion": (
        [{"prompt": "The sky is", "completion": " blue."}],
        "prompt_completion",
        {"prompt": "prompt", "completion": "completion"},
        [" blue."],
    ),
    "prompt and completion as messages": (
        [{"prompt": [user("q"), assistant("not this"), user("more")], "completion": [assistant("a")]}],
        "prompt_completion",
        {"prompt": "prompt", "completion": "completion"},
        ["a"],
    ),
    "prompt and completion with tools": (
        [{"prompt": "weather?", "completion": json.dumps([CALL]), "tools": json.dumps(TOOLS)}],
        "prompt_completion",
        {"prompt": "prompt", "completion": "completion", "tools": "tools"},
        [SAID_CALL],
    ),
    "prompt, completion and their rendering": (
        [{"prompt": "The sky", "completion": " is blue.", "text": "The sky is blue."}],
        "prompt_completion",
        {"prompt": "prompt", "completion": "completion"},
        [" is blue."],
    ),
    "wikitext": (
        [{"text": ""}, {"text": " = Title = \n"}, {"text": " a text \n"}],
        "text",
        {"text": "text"},
        [" = Title = \n", " a text \n"],
    ),
    "nothing but blank texts": ([{"text": ""}, {"text": None}], "text", {"text": "text"}, []),
    "the stack": ([{**STACK, "content": "def f(): pass"}], "text", {"text": "content"}, ["def f(): pass"]),
    "c4": ([{**WEB, "text": "web text"}], "text", {"text": "text"}, ["web text"]),
    "fineweb": (
        [{**WEB, "text": "t", "id": "<urn>", "dump": "CC", "file_path": "f", "language": "en"}],
        "text",
        {"text": "text"},
        ["t"],
    ),
    "ag news": ([{"text": "news", "label": 2}], "text", {"text": "text"}, ["news"]),
    "wikipedia": (
        [{"id": "1", "url": "u", "title": "T", "text": "body"}],
        "text",
        {"text": "text"},
        ["body"],
    ),
    "redpajama": ([{"raw_content": "t", "doc_id": "x"}], "text", {"text": "raw_content"}, ["t"]),
    "guanaco": (
        [{"text": "### Human: q### Assistant: a"}],
        "text",
        {"text": "text"},
        ["### Human: q### Assistant: a"],
    ),
    "speech with its text": (
        [{"audio": {"array": [0.1], "sampling_rate": 16000}, "text": "hello"}],
        "text",
        {"text": "text"},
        ["hello"],
    ),
    "images beside messages": (
        [{"messages": PAIR, "images": [b"x"]}],
        "messages",
        {"messages": "messages"},
        ["a"],
    ),
    "only stories": ([{"story": "once"}], "text", {"text": "story"}, ["once"]),
    "only sentences": ([{"sentence": "one", "id": 3}], "text", {"text": "sentence"}, ["one"]),
}

# Name -> (rows, words of the message, what is learned with the first settings that the message names; None: it names none).
UNCERTAIN = {
    "lima": (
        [{"conversations": ["q", "a"], "source": "stackexchange"}],
        "No format reads column 'conv",
        None,
    ),
    "ultrachat, raw": ([{"id": "0", "data": ["q", "a"]}], "No format reads column 'data'", None),
    "capybara": ([{"source": "s", "conversation": [{"input": "q", "output": "a"}]}], "No format reads", None),
    "role and value": ([{"turns": [{"role": "user", "value": "q"}]}], "No format reads column 'turns'", None),
    "nested": ([{"qa": {"question": "q", "answer": "a"}}], "No format reads column 'qa'", None),
    "tokens": ([{"input_ids": [1, 2], "labels": [1, 2]}], "No format reads column 'input_ids'", None),
    "numbers": ([{"x": 1, "y": 2.0, "z": True}], "None of them holds text: name another dataset", None),
    "dolly": (
        [{"instruction": "i", "context": "c", "response": "r", "category": "qa"}],
        "input: context",
        ["r"],
    ),
    "dolly without context": (
        [{"instruction": "i", "context": "", "response": "r", "category": "qa"}],
        "input: context",
        ["r"],
    ),
    "gsm8k": ([{"question": "1+1?", "answer": "It is 2\n#### 2"}], "chat template", ["It is 2\n#### 2"]),
    "openorca": (
        [
            {"id": "1", "system_prompt": "", "question": "q", "response": "r"},
            {"id": "2", "system_prompt": "be", "question": "q", "response": "r"},
        ],
        "alpaca",
        ["r", "r"],
    ),
    "cnn": ([{"article": "long", "highlights": "short", "id": "abc"}], "chat template", ["short"]),
    "xsum": ([{"document": "long", "summary": "short", "id": "abc"}], "chat template", ["short"]),
    "samsum": ([{"id": "1", "dialogue": "A: hi", "summary": "short"}], "chat template", ["short"]),
    "billsum": ([{"text": "bill", "summary": "short", "title": "An act"}], "chat template", ["short"]),
    "xlam": (
        [{"id": 1, "query": "weather?", "answers": json.dumps([CALL]), "tools": json.dumps([WEATHER])}],
        "with the tools",
        [SAID_CALL],
    ),
    "glaive": (
        [{"system": "SYSTEM: you", "chat": "USER: hi ASSISTANT: a"}],
        "text",
        ["USER: hi ASSISTANT: a"],
    ),
    "input and output": ([{"input": "q", "output": "a"}], "chat template", ["a"]),
    "inputs and targets": ([{"inputs": "q", "targets": "a", "language": "en"}], "chat template", ["a"]),
    "prompt and response": ([{"prompt": "q", "response": "a"}], "chat template", ["a"]),
    "metamath": ([{"query": "q", "response": "a", "type": "GSM"}], "chat template", ["a"]),
    "math": ([{"problem": "p", "solution": "s", "level": "1"}], "chat template", ["s"]),
    "medical": ([{"Question": "q", "Complex_CoT": "think", "Response": "r"}], "chat template", ["r"]),
    "alpaca in capitals": ([{"Instruction": "i", "Input": "", "Output": "o"}], "chat template", ["o"]),
    "sql": (
        [{"answer": "SELECT", "question": "q", "context": "CREATE TABLE"}],
        "input: context",
        ["SELECT"],
    ),
    "bitext": (
        [{"flags": "BLMZX", "instruction": "i", "intent": "x", "response": "r"}],
        "chat template",
        ["r"],
    ),
    "squad": (
        [{"id": "1", "title": "T", "context": "long", "question": "q", "answers": {"text": ["a"]}}],
        "text",
        ["long"],
    ),
    "mmlu": ([{"question": "q", "subject": "s", "choices": ["a", "b"], "answer": 1}], "text", ["q"]),
    "two conversations": ([{"messages": PAIR, "conversations": TURNS}], "data.format: messages", ["a"]),
    "messages and text": ([{"messages": PAIR, "text": "something"}], "data.format: messages", ["a"]),
    "two texts": ([{"content": "c", "body": "the body"}], "text", ["c"]),
    "hh-rlhf": (
        [{"chosen": "Human: q\n\nAssistant: good", "rejected": "Human: q\n\nAssistant: bad"}],
        "preference data",
        ["Human: q\n\nAssistant: good"],
    ),
    "ultrafeedback": (
        [
            {
                "prompt": "q",
                "chosen": [user("q"), assistant("good")],
                "rejected": [user("q"), assistant("bad")],
                "score_chosen": 8.0,
            }
        ],
        "preference data",
        ["good"],
    ),
    "preferences, implicit prompt as turns": (
        [{"chosen": [human("q"), gpt("good")], "rejected": [human("q"), gpt("bad")]}],
        "preference data",
        ["good"],
    ),
    "preferences with a prompt": (
        [{"prompt": [user("q")], "chosen": [assistant("good")], "rejected": [assistant("bad")]}],
        "preference data",
        ["good"],
    ),
    "orca pairs": (
        [{"system": "s", "question": "q", "chosen": "good", "rejected": "bad"}],
        "preference data",
        ["good"],
    ),
    "kto": ([{"prompt": "q", "completion": "a", "label": True}], "unpaired preference data", ["a"]),
    "kto with numbers": ([{"prompt": "q", "completion": "a", "label": 0}], "unpaired preference data", ["a"]),
    "prm": ([{"prompt": "q", "completions": ["s1"], "labels": [True]}], "stepwise", None),
    "opus": ([{"id": "0", "translation": {"en": "Hello", "fr": "Bonjour"}}], "translation data", None),
    "captions": ([{"image": {"bytes": b"x", "path": None}, "caption": "a cat"}], "column 'image'", ["a cat"]),
    "image links": ([{"image": "http://x/y.png", "caption": "a cat"}], "column 'image'", ["a cat"]),
    "only images": ([{"image": b"x", "label": 1}], "column 'image'", None),
    **{
        f"only {name}": ([{name: "some words"}], f"{{text: {name}}}", ["some words"])
        for name in (
            "id",
            "source",
            "image_id",
            "input",
            "prompt",
            "label",
            "title",
            "caption",
            "Text",
            "chat",
        )
    },
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    directory = tmp_path_factory.mktemp("tokenizer")
    texts = ["The sky is blue. Sort the words, get_weather Paris\n"] * 9
    files = {**tiny_tokenizers.byte_level_bpe(texts, 320), **tiny_tokenizers.bpe_config(8192)}
    for name, data in files.items():
        (directory / name).write_bytes(data)
    found = AutoTokenizer.from_pretrained(directory)
    found.chat_template = TEMPLATE
    return found


def learned(tokenizer, rows, **settings):
    """What is learned of each example, without the ends of the last turn and of the text."""
    said = []
    for example in encode_examples(rows, tokenizer, **settings):
        tokens = [label for label in example.labels if label != IGNORE_INDEX]
        text = tokenizer.decode(tokens, skip_special_tokens=False)
        assert text.endswith(tokenizer.eos_token)
        said.append(text.removesuffix(tokenizer.eos_token).removesuffix("<|im_end|>\n"))
    return said


def settings_of(message):
    """The settings that a message names, as the arguments of ``encode_examples``."""
    found = re.findall(r"(?:data\.format: (\w+) with )?data\.columns: \{([^}…]*)\}", message)
    return [
        {
            **({"format": name} if name else {}),
            "columns": dict(pair.split(": ") for pair in columns.split(", ")),
        }
        for name, columns in found
    ]


@pytest.mark.parametrize("name", CERTAIN)
def test_the_format_is_certain(name, tokenizer):
    rows, form, columns, said = CERTAIN[name]
    found = detect_format(rows)
    assert (found.name, dict(found.columns)) == (form, columns)
    assert learned(tokenizer, rows) == said
    # Written out they say the same.
    assert learned(tokenizer, rows, format=form, columns=columns) == said


@pytest.mark.parametrize("name", UNCERTAIN)
def test_settings_decide_where_the_format_is_not_certain(name, tokenizer):
    rows, words, said = UNCERTAIN[name]
    with pytest.raises(FormatError, match=re.escape(words)) as caught:
        detect_format(rows)
    message = str(caught.value)
    assert "\n" not in message
    for column, value in rows[0].items():
        assert f"{column} (" in message
        if isinstance(value, str) and value:
            shown = json.dumps(value)[1:-1] if "\n" in value else value
            assert shown[:40] in message or repr(value)[1:40] in message
    settings = settings_of(message)
    if said is None:
        assert settings == []
        return
    assert learned(tokenizer, rows, **settings[0]) == said
    for other in settings[1:]:
        assert all(learned(tokenizer, rows, **other)), other


def test_every_shape_counts():
    assert len(CERTAIN) + len(UNCERTAIN) >= 100


def test_what_an_answer_comes_with_is_in_its_prompt(tokenizer):
    rows = [
        *CERTAIN["alpaca with system and history"][0],
        {"instruction": "Say", "input": "x", "output": "y", "system": None, "history": None},
    ]
    first, second = (tokenizer.decode(one.input_ids) for one in encode_examples(rows, tokenizer))
    assert first.startswith(
        "<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\nold question<|im_end|>\n<|im_start|>assistant\nold answer"
    )
    assert second.startswith("<|im_start|>user\nSay\nx<|im_end|>\n<|im_start|>assistant\ny")
    orca, settings = UNCERTAIN["openorca"][0], {"instruction": "question", "output": "response"}
    plain, with_system = (
        tokenizer.decode(one.input_ids) for one in encode_examples(orca, tokenizer, columns=settings)
    )
    assert plain.startswith("<|im_start|>user")
    assert with_system.startswith("<|im_start|>system\nbe<|im_end|>")
    [called] = encode_examples(CERTAIN["prompt and completion with tools"][0], tokenizer)
    assert tokenizer.decode(called.input_ids).startswith('<|im_start|>tools\n[{"type": "function"')


def test_system_prompts_and_tools_that_the_first_rows_lack_are_not_lost(tokenizer):
    messages = {"messages": PAIR, "system": None, "tools": None}
    rows = [messages] * 150 + [{**messages, "system": "be brief", "tools": json.dumps(TOOLS)}]
    last = tokenizer.decode(encode_examples(rows, tokenizer)[-1].input_ids)
    assert "be brief" in last
    assert "get_weather" in last


def test_without_a_chat_template_instructions_are_rendered_as_alpaca_does(tokenizer):
    import copy

    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    rows = CERTAIN["alpaca"][0]
    with_input, without = (plain.decode(one.input_ids) for one in encode_examples(rows, plain))
    assert with_input.startswith("Below is an instruction that describes a task, paired with an input")
    assert with_input.endswith("### Input:\nb a\n\n### Response:\na b<|endoftext|>")
    assert without.endswith("### Instruction:\nSay\n\n### Response:\nhi<|endoftext|>")
    [system] = encode_examples([{**rows[0], "system": "be brief"}], plain)
    assert plain.decode(system.input_ids).startswith("be brief\n\nBelow is an instruction")
    with pytest.raises(
        BadRowError, match="no chat template: take a model with one, or set data.chat_template"
    ):
        encode_examples([{"messages": PAIR}], plain)


# Rows behind a good one -> words of the refusal.
REFUSED_ROWS = [
    ({"text": "t"}, {"text": 5}, "column 'text' holds numbers instead of text"),
    ({"text": "t"}, {"text": ["a"]}, "column 'text' holds lists instead of text"),
    ({"messages": PAIR}, {"messages": 5}, "column 'messages' holds int instead of a list"),
    ({"messages": PAIR}, {"messages": "no JSON"}, "column 'messages' holds str instead of a list"),
    ({"messages": PAIR}, {"messages": ["a"]}, "message 1 of column 'messages' must be an object with 'role'"),
    ({"messages": PAIR}, {"messages": [{"role": 3, "content": "a"}]}, "must be an object with 'role'"),
    ({"messages": PAIR}, {"messages": [{"role": "narrator", "content": "a"}]}, "has the role 'narrator'"),
    ({"messages": PAIR}, {"messages": [user("q"), assistant(7)]}, "has content of type int"),
    (
        {"messages": PAIR},
        {"messages": [user([{"type": "image"}]), assistant("a")]},
        "has a part of type 'image'",
    ),
    ({"messages": PAIR}, {"messages": [user("q")]}, "no message of the assistant"),
    ({"messages": PAIR}, {"messages": [{"role": "system", "content": "s"}]}, "no message of the assistant"),
    ({"messages": PAIR}, {"messages": [user("q"), assistant(" \n")]}, "message 2 .* is empty"),
    ({"messages": PAIR}, {"messages": [user("q"), assistant("a", weight=0)]}, "no message of the assistant"),
    ({"messages": PAIR}, {"messages": [user("q"), assistant("a", weight=0.5)]}, "has the weight 0.5"),
    ({"messages": PAIR}, {"messages": [user("q"), assistant("a", weight="0")]}, "has the weight '0'"),
    (
        {"messages": PAIR},
        {"messages": [user("q"), assistant("", tool_calls=["f"])]},
        "a tool call must have a name",
    ),
    (
        {"messages": PAIR},
        {"messages": [user("q"), assistant("", tool_calls=[{"name": "f", "arguments": "x=1"}])]},
        "the arguments of 'f' must be an object or its JSON",
    ),
    ({"messages": PAIR, "tools": "[]"}, {"messages": PAIR, "tools": "f(x)"}, "tools must be a list of JSON"),
    ({"messages": PAIR, "system": "s"}, {"messages": PAIR, "system": {"a": 1}}, "column 'system' holds"),
    (
        {"conversations": TURNS},
        {"conversations": [human("q"), {"from": "narrator", "value": "a"}]},
        "turn 2 of column 'conversations' is from 'narrator'",
    ),
    ({"conversations": TURNS}, {"conversations": [human("q"), gpt(None)]}, "message 2 .* is empty"),
    ({"conversations": TURNS}, {"conversations": [human("q"), gpt(["a"])]}, "has a value of type list"),
    (
        {"conversations": TURNS},
        {"conversations": [human("q"), {"from": "function_call", "value": "f(x)"}]},
        "must hold a call as JSON",
    ),
    ({"prompt": "p", "completion": "c"}, {"prompt": 5, "completion": "c"}, "column 'prompt' holds int"),
    (
        {"prompt": [user("q")], "completion": [assistant("a")]},
        {"prompt": [user("q")], "completion": [user("a")]},
        "no message of the assistant",
    ),
    (
        {"instruction": "i", "output": "o"},
        {"instruction": "", "output": "o"},
        "column 'instruction' is empty, so nothing asks for the output",
    ),
    (
        {"instruction": "i", "output": "o", "history": [["a", "b"]]},
        {"instruction": "i", "output": "o", "history": [["a"]]},
        "column 'history' must hold pairs",
    ),
]


@pytest.mark.parametrize(("good", "bad", "words"), REFUSED_ROWS)
def test_a_row_that_cannot_be_used_is_refused_by_its_number(good, bad, words, tokenizer):
    with pytest.raises(BadRowError, match=f"row 2: .*{words}") as caught:
        encode_examples([good, good, bad], tokenizer)
    assert caught.value.row == 2
    assert "\n" not in str(caught.value)


WRONG_SETTINGS = [
    ({"format": "messages"}, "needs a column for messages. Set data.columns: {messages: …}"),
    ({"format": "alpacca"}, "must be one of auto, text, messages"),
    ({"columns": {"text": "missing"}}, "there is no column 'missing'"),
    ({"columns": {"words": "a"}}, "fits no format: text has text; messages has"),
    ({"format": "text", "columns": {"texts": "a"}}, "has the role 'texts', but format 'text' has text"),
    ({"format": "text", "columns": {"text": "n"}}, "column 'n' holds numbers, but 'text'"),
    ({"format": "no.such:FORMAT"}, "cannot be imported"),
    ({"format": "json:NOTHING"}, "cannot be imported"),
    ({"format": "json:dumps"}, "is no row format: it lacks a name, roles"),
]


@pytest.mark.parametrize(("settings", "words"), WRONG_SETTINGS)
def test_wrong_settings_are_told(settings, words):
    with pytest.raises(FormatError, match=re.escape(words)):
        detect_format([{"a": "x", "b": "y", "n": 1}], **settings)


def test_no_rows_have_no_format():
    with pytest.raises(FormatError, match="there are no rows"):
        detect_format([])


class Dialog:
    """A format of a user: what LIMA has."""

    name = "dialog"
    roles = (Role(name="turns", names=("turns",), kinds=("lists",)),)

    def example(self, row, columns):
        turns = row[columns["turns"]]
        if len(turns) % 2:
            raise RowProblem("nobody answers")
        roles = ("user", "assistant")
        return Conversation(
            [{"role": roles[number % 2], "content": text} for number, text in enumerate(turns)]
        )


DIALOG = Dialog()


class Lines:
    """A format that reads one column in its own way."""

    name = "lines"
    roles = (Role(name="line", names=("line",), kinds=(TEXT,)),)

    def example(self, row, columns):
        prompt, _, completion = row[columns["line"]].partition("\t")
        return PromptCompletion(prompt, completion)


def test_a_registered_format_is_recognized(tokenizer, monkeypatch):
    monkeypatch.setattr(registry, "_FORMATS", dict(known_formats()))
    register_format(DIALOG)
    register_format(DIALOG)
    rows = [{"turns": ["q", "a", "more", "b"]}, {"turns": ["q"]}]
    assert learned(tokenizer, rows[:1]) == ["a<|im_end|>\nb"]
    assert learned(tokenizer, [{"said": ["q", "a"]}], columns={"turns": "said"}) == ["a"]
    with pytest.raises(BadRowError, match="row 1: nobody answers") as caught:
        encode_examples(rows, tokenizer)
    assert caught.value.row == 1
    with pytest.raises(FormatError, match="already a row format named 'dialog'"):
        register_format(Dialog())
    register_format(Lines())
    assert learned(tokenizer, [{"line": "one:\t two"}]) == [" two"]


def test_a_format_is_found_by_its_module(tokenizer, tmp_path: Path, monkeypatch):
    (tmp_path / "own_formats.py").write_text(
        "from metaflow_hf.data.formats import PromptCompletion, Role\n"
        "class Shout:\n"
        "    name = 'shout'\n"
        "    roles = (Role(name='word', names=('word',), kinds=('text',)),)\n"
        "    def example(self, row, columns):\n"
        "        return PromptCompletion(row[columns['word']], row[columns['word']].upper())\n"
        "FORMAT = Shout()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    rows = [{"word": "sky", "other": "x"}]
    assert learned(tokenizer, rows, format="own_formats:FORMAT") == ["SKY"]
    assert learned(tokenizer, rows, format="own_formats:FORMAT", columns={"word": "other"}) == ["X"]
