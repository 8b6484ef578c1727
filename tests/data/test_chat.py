"""What the assistant says, token by token, as the template renders it."""

import copy
import json

import pytest

from metaflow_hf.data import encode_examples
from metaflow_hf.data.chat import ChatTemplate, transcribe
from metaflow_hf.data.formats import Conversation, DetectedFormat, RowProblem
from metaflow_hf.data.tokens import IGNORE_INDEX, ExampleEncoder
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
    [doc] = encode_examples([{"messages": messages, **row}], tokenizer, format="messages")
    assert len(doc.labels) == len(doc.input_ids)
    assert all(label in (token, IGNORE_INDEX) for token, label in zip(doc.input_ids, doc.labels, strict=True))
    rendered = tokenizer.apply_chat_template(messages, tools=row.get("tools"), tokenize=False)
    ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert doc.input_ids in (ids, [*ids, tokenizer.eos_token_id])
    said = [token for token in doc.labels if token != IGNORE_INDEX]
    assert said[-1] == tokenizer.eos_token_id
    return tokenizer.decode(said if doc.input_ids == ids else said[:-1])


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
    call = {"type": "function", "function": {"name": "sum", "arguments": {"a": 1}}}
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
    [doc] = encode_examples([{"messages": messages, "tools": json.dumps(tools)}], tokenizer)
    assert tokenizer.decode(doc.input_ids).startswith('[tools][{"type": "function"')


REWRITING = [
    # Thoughts are taken out of all turns but the last one.
    (
        "{% for m in messages %}[{{ m['role'] }}]{% if loop.last %}{{ m['content'] }}{% else %}"
        "{{ m['content'].split('</think>')[-1] }}{% endif %}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}",
        ["[user]a</s>[assistant]", "[user]a</s>[assistant]c</s>[user]d</s>[assistant]"],
        ["<think>b</think>c</s>", "e</s>"],
    ),
    # An end of text is put behind the whole.
    (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% else %}<|endoftext|>{% endif %}",
        ["[user]a[assistant]", "[user]a[assistant]<think>b</think>c[user]d[assistant]"],
        ["<think>b</think>c<|endoftext|>", "e<|endoftext|>"],
    ),
]


def turns(thought="<think>b</think>"):
    return [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": f"{thought}c"},
        {"role": "user", "content": "d"},
        {"role": "assistant", "content": "e"},
    ]


@pytest.mark.parametrize(("template", "histories", "answers"), REWRITING)
def test_a_template_that_rewrites_history_gives_one_example_per_turn(speaking, template, histories, answers):
    tokenizer = speaking(template)
    found = encode_examples([{"messages": turns()}], tokenizer)
    end = tokenizer.eos_token
    assert [
        tokenizer.decode([t for t, n in zip(one.input_ids, one.labels, strict=True) if n == IGNORE_INDEX])
        for one in found
    ] == histories
    said = [tokenizer.decode([t for t in one.labels if t != IGNORE_INDEX]) for one in found]
    assert said == [answer if answer.endswith(end) else answer + end for answer in answers]
    assert [one.row for one in found] == [0, 0]


def test_what_the_prompt_adds_to_the_turn_is_not_looked_for_in_it(speaking):
    template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]<think>{% endif %}"
    )
    assert learned(turns(thought=""), speaking(template)) == "ce"


def test_a_history_that_changes_with_what_follows_is_refused(speaking):
    counting = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(BadRowError, match="row 0: .*in another way than it asks for it.*data.chat_template"):
        encode_examples([{"messages": turns()}], speaking(counting))


def test_bad_rows_can_be_left_out(speaking, caplog):
    rows = [{"messages": [{"role": "user"}, "no message"]}, {"messages": MULTI}, {"messages": 5}]
    form = DetectedFormat("messages", {"messages": "messages"})
    encoder = ExampleEncoder(speaking(CHATML), form, on_bad_row="skip")
    assert len(encoder.encode(rows)) == 1
    assert "row 0" in caplog.text
    assert "row 2" in caplog.text
    assert encoder.skipped == {"malformed": 2}
    with pytest.raises(BadRowError, match="block 3, row 7") as caught:
        ExampleEncoder(speaking(CHATML), form).encode(
            rows, name_row=lambda index: f"block 3, row {index + 7}"
        )
    assert caught.value.row == 0


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": MULTI, "tools": [{"name": "sum", "parameters": {}}]}, "leaves the tools out"),
        (
            {"messages": [{"role": "developer", "content": "be"}, *MULTI[1:]]},
            "leaves message 1 (of the developer) out",
        ),
        ({"messages": MULTI}, None),
    ],
)
def test_a_template_that_leaves_out_what_comes_before_an_answer_is_warned_of(speaking, row, said, caplog):
    some = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'developer' %}")
    assert len(encode_examples([row, row], speaking(some))) == 2
    assert caplog.text.count("so the model does not see it") == (said is not None)
    assert said is None or said in caplog.text


def test_a_slow_tokenizer_is_refused(speaking):
    class Slow:
        is_fast = False
        chat_template = CHATML

        def apply_chat_template(self, messages, **options):
            return "text"

    with pytest.raises(RowProblem, match="Slow does not say which characters"):
        transcribe(Conversation(MULTI), ChatTemplate(Slow()), learn_all=False)
