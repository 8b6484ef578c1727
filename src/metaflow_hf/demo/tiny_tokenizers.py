"""Trained tokenizers of the embedded models, as the files that transformers loads."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
CHAT_START = "<|im_start|>"
CHAT_END = "<|im_end|>"
BPE_SPECIAL_TOKENS = (END_OF_TEXT, PAD, CHAT_START, CHAT_END)  # ids 0 to 3

WORDPIECE_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # ids 0 to 4

_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_level_bpe(texts: Iterable[str], vocab_size: int) -> dict[str, bytes]:
    """``tokenizer.json`` of a byte-level BPE trained on ``texts``: any text survives encode and decode.

    The same texts give the same bytes in every process.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(BPE_SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return {"tokenizer.json": tokenizer.to_str(pretty=True).encode()}


def bpe_config(model_max_length: int) -> dict[str, bytes]:
    """``tokenizer_config.json`` beside a `byte_level_bpe`, with a chat template."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": PAD,
        "additional_special_tokens": [CHAT_START, CHAT_END],
        "model_max_length": model_max_length,
        "clean_up_tokenization_spaces": False,
        "chat_template": _CHAT_TEMPLATE,
    }
    return {"tokenizer_config.json": _json(config)}


def vocab_and_merges(tokenizer_json: bytes) -> dict[str, bytes]:
    """The older two-file form of a BPE, which GPT-2 repositories carry as well."""
    model = json.loads(tokenizer_json)["model"]
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    return {
        "vocab.json": json.dumps(model["vocab"], ensure_ascii=False).encode(),
        "merges.txt": f"#version: 0.2\n{merges}\n".encode(),
    }


def wordpiece(texts: Iterable[str], num_words: int) -> dict[str, bytes]:
    """The files of an uncased WordPiece tokenizer: the most frequent words, and all characters to spell others."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    vocab = {token: i for i, token in enumerate(_word_vocabulary(texts, num_words))}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.add_special_tokens(list(WORDPIECE_SPECIAL_TOKENS))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])],
    )
    config = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": True,
        "model_max_length": 512,
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    return {
        "vocab.txt": "".join(f"{token}\n" for token in vocab).encode(),
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": _json(config),
    }


def _word_vocabulary(texts: Iterable[str], num_words: int) -> Sequence[str]:
    counts = Counter(word for text in texts for word in text.lower().split() if word.isalpha())
    frequent = sorted(counts, key=lambda w: (-counts[w], w))[:num_words]
    letters = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
    spelling = [*letters, *(f"##{c}" for c in letters)]
    return list(dict.fromkeys([*WORDPIECE_SPECIAL_TOKENS, *spelling, *frequent]))


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
