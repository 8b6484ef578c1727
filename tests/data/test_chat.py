"""What the assistant says, token by token, as the template renders it."""

import copy
import json

import pytest

from metaflow_hf.data.batches import IGNORE_INDEX, encode_rows
from metaflow_hf.data.chat import Conversation, transcribe
from metaflow_hf.demo import tiny_tokenizers
from metaflow_hf.errors import BadRowError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = (
    "{% if tools %}[tools]{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}[{{ m['role'] }}]"
    "{% if m['tool_calls'] %}{{ m['tool_calls'] | tojson }}{% else %}{{ m['content'] }}{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
INSTRUCT = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% elif m['role'] == 'system' %}"
    "<<SYS>>{{ m['content'] }}<</SYS>>{% else %} {{ m['content'] }}<|endoftext|>{% endif %}{% endfor %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] | trim }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
)
MULTI = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi  there"},
    {"role": "assistant", "content": "  hello \n"},
    {"role": "user", "content": "assistant? <|im_start|>assistant\nno"},
    {"role": "assistant", "content": "größe 😀"},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    from transformers import AutoTokenizer

    directory = tmp_path_factory.mktemp("tokenizer")
    files = {
        **tiny_tokenizers.byte_level_bpe(["hello there, be brief and user hi assistant\n"] * 9, 320),
        **tiny_tokenizers.bpe_config(2048),
    }
    for name, data in files.items():
        (directory / name).write_bytes(data)
    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture
def speaking(base):
    def make(template):
        tokenizer = copy.deepcopy(base)
        tokenizer.chat_template = template
        return tokenizer

    return make


def learned(messages, tokenizer, **row):
    [doc] = encode_rows([{"messages": messages, **row}], tokenizer, text_column="messages")
    assert len(doc.labels) == len(doc.input_ids)
    assert all(label in (token, IGNORE_INDEX) for token, label in zip(doc.input_ids, doc.labels, strict=True))
    rendered = tokenizer.apply_chat_template(messages, tools=row.get("tools"), tokenize=False)
    assert doc.input_ids == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    return tokenizer.decode([token for token in doc.labels if token != IGNORE_INDEX])


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (CHATML, "  hello \n<|im_end|>\ngröße 😀<|im_end|>\n"),
        (INSTRUCT, "   hello \n<|endoftext|> größe 😀<|endoftext|>"),
        (MARKED, "hello<|im_end|>größe 😀<|im_end|>"),
    ],
)
def test_several_turns(speaking, template, said):
    assert learned(MULTI, speaking(template)) == said


def test_the_first_turn_may_be_the_assistants(speaking):
    messages = [{"role": "assistant", "content": "welcome"}, *MULTI[1:3]]
    assert learned(messages, speaking(CHATML)) == "welcome<|im_end|>\n  hello \n<|im_end|>\n"
    assert learned(messages[:1], speaking(INSTRUCT)) == " welcome<|endoftext|>"


def test_calls_of_tools_are_said_and_their_answers_are_not(speaking):
    tools = [{"type": "function", "function": {"name": "sum", "parameters": {}}}]
    call = {"name": "sum", "arguments": {"a": 1}}
    messages = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "two"},
    ]
    tokenizer = speaking(TOOLS)
    said = json.dumps([call]) + "</s>two</s>"
    assert learned(messages, tokenizer, tools=tools) == said
    # As JSON text, which is how columns of tables hold them.
    [doc] = encode_rows(
        [{"messages": messages, "tools": json.dumps(tools)}], tokenizer, text_column="messages"
    )
    assert tokenizer.decode(doc.input_ids).startswith('[tools][{"type": "function"')


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        # Thoughts are taken out of all turns but the last one.
        (
            "{% for m in messages %}[{{ m['role'] }}]{% if loop.last %}{{ m['content'] }}{% else %}"
            "{{ m['content'].split('</think>')[-1] }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}[assistant]{% endif %}",
            r"changes earlier turns when later ones follow \(around message 2\)",
        ),
        # Something stands at the end of the whole.
        (
            "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
            "{% if add_generation_prompt %}[assistant]{% else %}<|endoftext|>{% endif %}",
            "changes earlier turns",
        ),
        # It asks for thoughts that the data do not have.
        (
            "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
            "{% if add_generation_prompt %}[assistant]<think>{% endif %}",
            "begins message 4 in another way than it asks for it",
        ),
    ],
)
def test_what_cannot_be_told_apart_is_refused_with_the_remedy(speaking, template, reason):
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>b</think>c"},
        {"role": "user", "content": "d"},
        {"role": "assistant", "content": "e"},
    ]
    tokenizer = speaking(template)
    with pytest.raises(BadRowError, match=rf"row 0: the model's chat template {reason}.*data.loss_on: all"):
        encode_rows([{"messages": messages}], tokenizer, text_column="messages")
    [doc] = encode_rows([{"messages": messages}], tokenizer, text_column="messages", loss_on="all")
    assert doc.labels == doc.input_ids


def test_bad_rows_can_be_left_out(speaking, caplog):
    rows = [{"messages": [{"role": "user"}, "no message"]}, {"messages": MULTI}, {"messages": 5}]
    found = encode_rows(rows, speaking(CHATML), text_column="messages", on_bad_row="skip")
    assert len(found) == 1
    assert "row 0" in caplog.text
    assert "row 2" in caplog.text
    with pytest.raises(BadRowError, match="block 3, row 7"):
        encode_rows(
            rows, speaking(CHATML), text_column="messages", name_row=lambda index: f"block 3, row {index + 7}"
        )


def test_a_slow_tokenizer_is_refused(speaking):
    class Slow:
        is_fast = False
        chat_template = CHATML

        def apply_chat_template(self, messages, **options):
            return "text"

    with pytest.raises(BadRowError, match="Slow does not tell which characters"):
        transcribe(Conversation(MULTI), Slow(), find_spoken=True, row="row 1")


def test_whitespace_that_offsets_leave_out_is_said_all_the_same(base):
    """Byte-level tokenizers may trim offsets: a token of spaces alone then has none."""
    from tokenizers import processors

    tokenizer = copy.deepcopy(base)
    tokenizer._tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.chat_template = CHATML
    messages = [{"role": "user", "content": "a "}, {"role": "assistant", "content": "   b   "}]
    assert learned(messages, tokenizer) == "   b   <|im_end|>\n"
