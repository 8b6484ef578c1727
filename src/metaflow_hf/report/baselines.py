"""What needs no training, to compare a trained model with: a compressor and a unigram model."""

import lzma
import math
from collections import Counter
from collections.abc import Iterable, Sequence

from metaflow_hf.errors import SelectionError


def xz_bits_per_byte(texts: Iterable[str]) -> float:
    """Bits per byte of UTF-8 that ``xz -9`` needs for these texts, written one after another in one file.

    The figure includes the container (about 60 bytes), as the command's output does. Takes one or two seconds
    per MB; memory grows with the text up to the preset's 700 MiB.

    Raises ``SelectionError`` when the texts hold no byte.
    """
    compressor = lzma.LZMACompressor(format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC64, preset=9)
    plain_bytes = packed_bytes = 0
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        plain_bytes += len(data)
        packed_bytes += len(compressor.compress(data))
    packed_bytes += len(compressor.flush())
    if plain_bytes == 0:
        raise SelectionError("no text to compress: the held-out texts are empty. Hold out samples with text.")
    return 8 * packed_bytes / plain_bytes


class UnigramModel:
    """Each token by its frequency in the training text, whatever came before; add-one smoothed.

    Every token of the vocabulary has a probability above zero, and they sum to one. Memory: one counter per
    distinct token. Raises ``SelectionError`` for a token outside ``[0, vocabulary_size)``.
    """

    def __init__(self, documents: Iterable[Sequence[int]], vocabulary_size: int) -> None:
        if vocabulary_size < 1:
            raise SelectionError(f"vocabulary_size is {vocabulary_size}: a model needs at least one token.")
        self.vocabulary_size = vocabulary_size
        self._counts: Counter[int] = Counter()
        for document in documents:
            self._counts.update(document)
        self._check(self._counts)
        self._total = self._counts.total() + vocabulary_size

    def _check(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            if not 0 <= token < self.vocabulary_size:
                raise SelectionError(
                    f"token {token} is outside the vocabulary of {self.vocabulary_size} tokens: count both texts "
                    "with the tokenizer whose vocabulary size was given."
                )

    def probability(self, token: int) -> float:
        """P(token), above zero for every token of the vocabulary."""
        self._check((token,))
        return (self._counts[token] + 1) / self._total

    def loss(self, documents: Iterable[Sequence[int]]) -> float:
        """Mean loss in nats per token; its ``exp`` is the perplexity.

        To compare with a language model, give the tokens that count for it (after the shift: without the first
        one of each sequence). Raises ``SelectionError`` without any token.
        """
        tokens: Counter[int] = Counter()
        for document in documents:
            tokens.update(document)
        if not tokens:
            raise SelectionError("no token to measure: the held-out documents are empty.")
        self._check(tokens)
        nats = sum(number * -math.log(self.probability(token)) for token, number in tokens.items())
        return nats / tokens.total()
