"""Every token exactly once, counted exactly, the same everywhere; loss only where it belongs."""

import copy
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metaflow_hf.data import encode_examples
from metaflow_hf.data.batches import IGNORE_INDEX, EncodedExample, LeftOut, make_batches, pieces
from metaflow_hf.data.prefetch import Prefetcher
from metaflow_hf.errors import BadRowError, ConfigError

torch.set_num_threads(1)
EOS = 1

documents = st.lists(
    st.lists(st.integers(2, 30), min_size=0, max_size=40).map(lambda ids: EncodedExample(ids, ids)),
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(documents, st.integers(2, 16), st.integers(1, 5), st.booleans(), st.sampled_from(["split", "rollout"]))
def test_every_token_is_in_exactly_one_batch(docs, length, size, packing, long):
    batches = make_batches(
        docs, sequence_length=length, batch_size=size, packing=packing, eos_token_id=EOS, long_documents=long
    )
    ended = [[*doc.input_ids, EOS] for doc in docs if doc.input_ids]
    is_long = [len(ids) > length and long == "rollout" for ids in ended]
    expected = [t for ids, alone in zip(ended, is_long, strict=True) if not alone for t in ids]
    assert _tokens([batch for batch in batches if not batch.is_long]) == expected
    assert [_tokens([b]) for b in batches if b.is_long] == [
        i for i, alone in zip(ended, is_long, strict=True) if alone
    ]
    for batch in batches:
        rows, width = batch.input_ids.shape
        assert rows <= size
        assert batch.is_long or width <= length
        assert batch.input_ids.shape == batch.labels.shape == batch.attention_mask.shape
        assert torch.equal(batch.labels != IGNORE_INDEX, batch.attention_mask.bool())
        lengths = batch.attention_mask.sum(1)
        assert torch.equal(batch.attention_mask, (torch.arange(width) < lengths[:, None]).long()), (
            "padded right"
        )
        assert batch.num_tokens == int((lengths - 1).sum())
        assert batch.num_input_tokens == int(lengths.sum())
    if packing:
        full = [row for batch in batches if not batch.is_long for row in batch.attention_mask.sum(1).tolist()]
        assert all(count == length for count in full[:-1]), "only the last sequence may be shorter"


def test_the_same_documents_give_the_same_batches():
    docs = [EncodedExample(list(range(2, n)), list(range(2, n))) for n in (5, 30, 9)]
    first, second = (make_batches(docs, sequence_length=8, batch_size=2, eos_token_id=EOS) for _ in range(2))
    assert all(torch.equal(a.input_ids, b.input_ids) and torch.equal(a.labels, b.labels) for a, b in zip(first, second, strict=True))  # fmt: skip


def test_a_document_that_ends_already_gets_no_second_end():
    [batch] = make_batches([EncodedExample([5, EOS], [5, EOS])], sequence_length=8, eos_token_id=EOS)
    assert batch.input_ids.tolist() == [[5, EOS]]


def test_without_packing_each_document_is_a_sequence():
    docs = [EncodedExample([2, 3, 4], [2, 3, 4]), EncodedExample([5], [5])]
    [batch] = make_batches(docs, sequence_length=8, packing=False, eos_token_id=EOS, pad_token_id=0)
    assert batch.input_ids.tolist() == [[2, 3, 4, EOS], [5, EOS, 0, 0]]
    assert batch.labels.tolist() == [[2, 3, 4, EOS], [5, EOS, IGNORE_INDEX, IGNORE_INDEX]]
    assert batch.num_tokens == 4


def test_truncation_drops_what_is_too_long():
    [batch] = make_batches(
        [EncodedExample([2, 3, 4, 5], [2, 3, 4, 5])],
        sequence_length=3,
        packing=False,
        eos_token_id=EOS,
        long_documents="truncate",
    )
    assert batch.input_ids.tolist() == [[2, 3, 4]]


def test_no_documents_give_no_batches():
    assert make_batches([], sequence_length=8) == []
    assert make_batches([EncodedExample([], [])], sequence_length=8, packing=False) == []


@pytest.mark.parametrize("wrong", [{"sequence_length": 1}, {"batch_size": 0}])
def test_sizes_are_checked(wrong):
    with pytest.raises(ConfigError):
        make_batches([], **{"sequence_length": 8, "batch_size": 1, **wrong})


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level BPE with a chat template, as small as they come."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    tokens = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    return tokenizer


def texts(*words):
    return [{"text": word} for word in words]


def test_texts_become_documents_in_order_and_rows_without_text_none(tokenizer):
    rows = [{"text": "ab"}, {"text": None}, {"text": ""}, {"other": 1}, {"text": "c\u2028"}]
    docs = encode_examples(rows, tokenizer)
    assert [tokenizer.decode(doc.input_ids) for doc in docs] == ["ab</s>", "c\u2028</s>"]
    assert all(doc.labels == doc.input_ids for doc in docs)
    assert [doc.row for doc in docs] == [0, 4]
    assert encode_examples([{"text": ""}, *rows[:1]], tokenizer)[0].input_ids == docs[0].input_ids


def test_token_counts_are_exact(tokenizer):
    words = ["one", "two three", "x" * 100]
    batches = make_batches(
        encode_examples(texts(*words), tokenizer),
        sequence_length=16,
        batch_size=2,
        eos_token_id=tokenizer.eos_token_id,
    )
    total = sum(len(text) + 1 for text in words)
    assert sum(batch.num_input_tokens for batch in batches) == total
    assert sum(batch.num_tokens for batch in batches) == total - sum(
        batch.input_ids.shape[0] for batch in batches
    )


def test_only_what_the_assistant_says_carries_loss(tokenizer):
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "assistant?"},
        {"role": "assistant", "content": "yes"},
    ]
    [doc] = encode_examples([{"messages": messages}], tokenizer, format="messages")
    learned = [token for token in doc.labels if token != IGNORE_INDEX]
    assert tokenizer.decode(learned) == "hello</s>yes</s>"
    assert tokenizer.decode(doc.input_ids).startswith("[system]be brief[user]hi[assistant]hello</s>")
    [everything] = encode_examples([{"messages": messages}], tokenizer, format="messages", loss_on="all")
    assert everything.labels == everything.input_ids == doc.input_ids


def test_a_conversation_needs_a_template_that_takes_it(tokenizer):
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    refusing = copy.deepcopy(tokenizer)
    refusing.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(BadRowError, match="row 0.*roles must alternate"):
        encode_examples(rows, refusing)
    refusing.chat_template = None
    with pytest.raises(BadRowError, match="no chat template"):
        encode_examples(rows, refusing)


@pytest.mark.parametrize("value", [5, [1, 2], ["text"], [{"content": "no role"}]])
def test_what_is_not_text_is_refused(value, tokenizer):
    rows = [{"text": "fine"}] * 101 + [{"text": value}]
    with pytest.raises(BadRowError, match="row 101: column 'text' holds"):
        encode_examples(rows, tokenizer)


def test_the_prefetcher_keeps_the_order_and_works_ahead():
    produced = []

    def produce():
        for i in range(5):
            produced.append(i)
            yield i

    with Prefetcher(produce(), depth=2) as ahead:
        assert next(ahead) == 0
        deadline = time.monotonic() + 5
        while len(produced) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert produced == [0, 1, 2, 3], "two are ready, one waits to be handed over"
        assert list(ahead) == [1, 2, 3, 4]
        assert list(ahead) == []


def test_an_error_of_the_producer_reaches_the_consumer_in_its_place():
    def produce():
        yield 1
        raise OSError("gone")

    ahead = Prefetcher(produce())
    assert next(ahead) == 1
    with pytest.raises(OSError, match="gone"):
        next(ahead)
    assert list(ahead) == []
    ahead.close()


def test_closing_returns_what_nobody_consumed_and_ends_the_thread():
    ahead = Prefetcher(iter(range(100)), depth=3)
    assert next(ahead) == 0
    left = ahead.close()
    assert left == list(range(1, 1 + len(left)))
    assert len(left) >= 3
    assert ahead.close() == []
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def _tokens(batches):
    return [
        token
        for batch in batches
        for ids, mask in zip(batch.input_ids.tolist(), batch.attention_mask.tolist(), strict=True)
        for token, counts in zip(ids, mask, strict=True)
        if counts
    ]


@settings(max_examples=100, deadline=None)
@given(documents, st.integers(2, 16), st.integers(1, 5))
def test_isolated_documents_lose_nothing_but_what_the_one_before_would_predict(docs, length, size):
    arguments = {"sequence_length": length, "batch_size": size, "eos_token_id": EOS}
    plain = make_batches(docs, **arguments)
    isolated = make_batches(docs, packing="isolated", **arguments)
    starts, place = set(), 0
    for doc in docs:
        if doc.input_ids:
            starts.add(place)
            place += len(doc.input_ids) + 1
    at = 0
    for joined, apart in zip(plain, isolated, strict=True):
        assert torch.equal(joined.input_ids, apart.input_ids)
        assert torch.equal(joined.attention_mask, apart.attention_mask)
        assert "attention_mask" not in apart.to_mapping()
        for row, mask in enumerate(joined.attention_mask.tolist()):
            position = 0
            for column in range(sum(mask)):
                begins = at in starts
                position = 0 if begins or column == 0 else position + 1
                assert apart.position_ids[row, column] == position
                expected = IGNORE_INDEX if begins or column == 0 else joined.labels[row, column]
                assert apart.labels[row, column] == expected
                at += 1
    assert at == place


@settings(max_examples=100, deadline=None)
@given(documents, st.integers(2, 16), st.sampled_from(["truncate", "drop"]), st.booleans())
def test_what_is_left_out_is_counted_to_the_token(docs, length, policy, packing):
    counts = LeftOut()
    batches = make_batches(
        docs,
        sequence_length=length,
        packing=packing,
        eos_token_id=EOS,
        long_documents=policy,
        left_out=counts,
    )
    ended = [len(doc.input_ids) + 1 for doc in docs if doc.input_ids]
    assert counts.documents == sum(size > length for size in ended)
    assert counts.tokens + sum(batch.num_input_tokens for batch in batches) == sum(ended)
    if policy == "drop":
        assert counts.tokens == sum(size for size in ended if size > length)


@torch.no_grad()
def test_isolated_documents_are_trained_as_if_each_stood_alone():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
        )
    ).eval()
    docs = [
        EncodedExample(ids, ids) for ids in ([5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16], [17, 18, 19])
    ]
    # The last document is cut at a border, the last sequence is padded.
    batches = make_batches(docs, sequence_length=17, batch_size=2, packing="isolated", eos_token_id=EOS)
    [batch] = batches
    assert batch.input_ids.shape == (2, 17)
    apart = [[5, 6, 7, 8, EOS], [9, 10, EOS], [11, 12, 13, 14, 15, 16, EOS], [17, 18], [19, EOS]]
    losses = [float(model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss) for ids in apart]
    expected = sum(loss * (len(ids) - 1) for loss, ids in zip(losses, apart, strict=True))
    assert batch.num_tokens == sum(len(ids) - 1 for ids in apart)
    found = float(model(**batch.to_mapping()).loss)
    assert found == pytest.approx(expected / batch.num_tokens, rel=1e-5)
    [joined] = make_batches(docs, sequence_length=17, batch_size=2, eos_token_id=EOS)
    assert float(model(**joined.to_mapping()).loss) != pytest.approx(found, rel=1e-3)


def test_a_batch_is_shown_token_by_token(tokenizer):
    docs = encode_examples(texts("ab", "c"), tokenizer)
    [batch] = make_batches(docs, sequence_length=16, packing=False, eos_token_id=1, pad_token_id=0)
    shown = pieces(batch, tokenizer)
    assert [[(piece.text, piece.has_loss) for piece in sequence] for sequence in shown] == [
        [("a", False), ("b", True), ("</s>", True)],
        [("c", False), ("</s>", True)],
    ]
    assert sum(piece.has_loss for sequence in shown for piece in sequence) == batch.num_tokens


def test_special_tokens_spelled_out_are_these_tokens(tokenizer):
    [doc] = encode_examples(texts("a</s>b"), tokenizer)
    assert doc.input_ids == [tokenizer.convert_tokens_to_ids("a"), 1, tokenizer.convert_tokens_to_ids("b"), 1]


def test_a_beginning_is_not_doubled(tokenizer):
    from tokenizers.processors import TemplateProcessing

    begins = copy.deepcopy(tokenizer)
    begins._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    plain, rendered = encode_examples(texts("ab", "<s>ab"), begins)
    assert plain.input_ids == rendered.input_ids
    assert plain.input_ids[0] == 0
    # The end that the tokenizer adds is not doubled either.
    [batch] = make_batches([plain], sequence_length=8, eos_token_id=1)
    assert batch.input_ids.tolist() == [plain.input_ids]


def test_a_tokenizer_without_special_tokens_will_do(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.bos_token = bare.eos_token = bare.pad_token = None
    docs = encode_examples(texts("ab", "c"), bare)
    [batch] = make_batches(
        docs, sequence_length=8, packing=False, eos_token_id=bare.eos_token_id, pad_token_id=bare.pad_token_id
    )
    assert batch.num_input_tokens == 3
    assert batch.attention_mask.tolist() == [[1, 1], [1, 0]]
    assert batch.labels[1, 1] == IGNORE_INDEX


@pytest.mark.parametrize(("role", "label"), [("assistant", EOS), ("user", IGNORE_INDEX)])
def test_the_end_of_a_conversation_is_learned_only_after_the_assistant(tokenizer, role, label):
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    messages = [{"role": "assistant", "content": "a"}, {"role": role, "content": "b"}]
    docs = encode_examples([{"messages": messages}], chat, format="messages")
    [batch] = make_batches(docs, sequence_length=64, eos_token_id=EOS)
    assert batch.input_ids[0, -1] == EOS
    assert batch.labels[0, -1] == label
