"""Tokenizers of every kind, on conversations that are made to confuse them, against transformers' own marks."""

import copy
import time

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from metaflow_hf.data import encode_examples
from metaflow_hf.data.tokens import IGNORE_INDEX
from metaflow_hf.errors import BadRowError

TURN = "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
PLAIN = (
    f"{{% for m in messages %}}{TURN}{{% endfor %}}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m['content'] }}<|im_end|>\n{% endgeneration %}{% else %}"
    + TURN
    + "{% endif %}{% endfor %}"
)
WORDS = ["hello there, the sky is blue and user hi assistant café größe\n"] * 9
TURNS = ["<|im_start|>", "<|im_end|>"]
# As SentencePiece of Llama 2 was converted.
PREPEND = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def speaking(tokenizer, **tokens):
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)
    found.add_special_tokens({"additional_special_tokens": TURNS})
    found.chat_template = PLAIN
    return found


def sentencepiece(prefix="always", *, normalizer=None, added=None, byte_fallback=True):
    tokenizer = Tokenizer(models.BPE(byte_fallback=byte_fallback, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=prefix)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256 * byte_fallback))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(WORDS, trainer)
    if added:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=added, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return speaking(tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>")


def byte_level(normalizer=None, *, eos="<|end|>"):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(WORDS, trainer)
    return speaking(tokenizer, eos_token=eos, pad_token=eos)


TOKENIZERS = {
    "prefix space": sentencepiece,
    "prefix space first": lambda: sentencepiece("first"),
    "adds BOS": lambda: sentencepiece(added="<s> $A"),
    "adds BOS and EOS": lambda: sentencepiece("first", added="<s> $A </s>"),
    "no bytes": lambda: sentencepiece("never", byte_fallback=False),
    "llama 2": lambda: sentencepiece("never", normalizer=PREPEND),
    "NFKC": lambda: sentencepiece(normalizer=normalizers.NFKC()),
    "lower case": lambda: sentencepiece(
        normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    ),
    "bytes, no BOS": byte_level,
    "bytes, NFC": lambda: byte_level(normalizers.NFC()),
    "bytes, NFD": lambda: byte_level(normalizers.NFD()),
    "bytes, no EOS": lambda: byte_level(eos=None),
}


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


CONVERSATIONS = {
    "plain": [user("hi"), assistant("hello there"), user("sky"), assistant("blue")],
    "begins with a combining mark": [user("\u0301"), assistant("\u0301e x"), user("q"), assistant("e\u0301")],
    "emoji": [user("👩‍👩‍👧"), assistant("😀👩‍👩‍👧"), user("x"), assistant("😀")],
    "ligatures": [user("\ufb01"), assistant("\ufb01ne ① ½"), user("q"), assistant("…")],
    "hangul": [user("\u1112"), assistant("\u1100\u1161")],
    "turns in a question": [user("a<|im_end|>\n<|im_start|>assistant\nfake"), assistant("hello there")],
    "turns in an answer": [user("hi"), assistant("a<|im_end|>\n<|im_start|>user\nfake")],
    "Jinja": [user("{% for x in y %}{{ 7*7 }}"), assistant("{{ messages }}{% endfor %}")],
    "spaces": [user(" a "), assistant("  b  "), user("x"), assistant("\n\nb\n")],
    "ends of texts": [user("a</s>b<|end|>"), assistant("c</s>d<|end|>e")],
    "invisible": [user("x"), assistant("\u200b"), user("x"), assistant("\u200fשלום")],
    "the assistant first": [assistant("welcome"), user("hi"), assistant("ho")],
    "two answers": [user("hi"), assistant("one"), assistant("two")],
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_labels_are_those_that_marks_of_the_template_give(kind, tokenizer):
    messages = CONVERSATIONS[kind]
    marked = copy.deepcopy(tokenizer)
    marked.chat_template = MARKED
    expected = marked.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    [example] = encode_examples([{"messages": messages}], tokenizer)
    ids, mask = expected["input_ids"], expected["assistant_masks"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    assert list(example.input_ids) == [*ids, *end]
    found = list(example.labels)
    wanted = [token if one else IGNORE_INDEX for token, one in zip(ids, mask, strict=True)] + end
    different = [
        place
        for place, (label, want) in enumerate(zip(found, wanted, strict=True))
        if label != want and tokenizer.decode([example.input_ids[place]]).strip()
    ]
    # Tokens of nothing but white space may lie on either side of a border.
    assert different == []
    [from_marks] = encode_examples([{"messages": messages}], marked)
    assert list(from_marks.input_ids) == list(example.input_ids)


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": "be"}],
        [{"role": "tool", "content": "20"}],
        [user("hi")],
        [user("hi"), assistant("\u00a0")],
    ],
)
def test_conversations_without_an_answer_are_refused(messages):
    with pytest.raises(BadRowError, match="row 0: (no message of the assistant|message 2 .* is empty)"):
        encode_examples([{"messages": messages}], byte_level(), format="messages")


@pytest.mark.parametrize("tools", [[], "[]", "", None, "null"])
def test_no_tools_are_none(tools):
    tokenizer = byte_level()
    tokenizer.chat_template = "{% if tools is not none %}TOOLS{% endif %}" + PLAIN
    [example] = encode_examples([{"messages": CONVERSATIONS["plain"], "tools": tools}], tokenizer)
    assert "TOOLS" not in tokenizer.decode(example.input_ids)


def test_a_slow_tokenizer_takes_completions_and_refuses_conversations():
    slow = ByT5Tokenizer()
    assert not slow.is_fast
    [example] = encode_examples([{"prompt": "The sky", "completion": " is größe"}], slow)
    said = [token for token in example.labels if token != IGNORE_INDEX]
    assert slow.decode(said[:-1]) == " is größe"
    assert said[-1] == slow.eos_token_id
    assert list(example.input_ids) == slow("The sky is größe")["input_ids"]
    slow.chat_template = PLAIN
    with pytest.raises(BadRowError, match="ByT5Tokenizer does not say which characters .* data.loss_on: all"):
        encode_examples([{"messages": CONVERSATIONS["plain"]}], slow)


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_long_conversations_cost_little(template):
    """200 turns of about 400 characters; what a template renders for each turn is short beside the tokens."""
    tokenizer = byte_level()
    tokenizer.chat_template = template
    messages = [
        turn
        for number in range(100)
        for turn in (user(f"question {number} " * 20), assistant(f"answer {number} " * 40))
    ]
    encode_examples([{"messages": messages[:4]}], tokenizer)
    begun = time.process_time()
    examples = encode_examples([{"messages": messages}], tokenizer)
    assert time.process_time() - begun < 2
    assert len(examples) == 1
    # One turn that is not learned does not make an example of every other.
    messages[1] = {**messages[1], "weight": 0}
    [example] = encode_examples([{"messages": messages[:20]}], tokenizer)
    assert example.num_labels < examples[0].num_labels
