import math
import random
import shutil
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaflow_hf import errors
from metaflow_hf.report import UnigramModel, xz_bits_per_byte

TEXTS = ["The quick brown fox jumps over the lazy dog.\n" * 40, "ünïcödé 日本語 " * 100, ""]


@pytest.mark.skipif(shutil.which("xz") is None, reason="no xz here")
def test_is_what_the_command_needs():
    data = "".join(TEXTS).encode()
    packed = subprocess.run(
        ["xz", "-9", "-T1", "--stdout"], input=data, capture_output=True, check=True
    ).stdout
    assert xz_bits_per_byte(TEXTS) == 8 * len(packed) / len(data)


def test_bounds():
    noise = random.Random(0).randbytes(20_000).hex()
    assert 4.0 <= xz_bits_per_byte([noise]) < 4.8  # hexadecimal digits hold 4 bits
    assert xz_bits_per_byte(["a" * 1_000_000]) < 0.01
    assert xz_bits_per_byte(iter(TEXTS)) == xz_bits_per_byte(["".join(TEXTS)])
    assert xz_bits_per_byte(["\ud800 lone surrogate"]) > 0


def test_finds_repetitions_as_far_apart_as_only_preset_9_does():
    noise = random.Random(0).randbytes(20_000).hex()
    filler = "a" * (9 * 2**20)
    twice, once = ([noise, filler, noise], [noise, filler])
    packed = [xz_bits_per_byte(texts) * sum(map(len, texts)) / 8 for texts in (twice, once)]
    assert packed[0] < 1.05 * packed[1]


@pytest.mark.parametrize("texts", [[], [""]])
def test_no_text_is_an_error(texts):
    with pytest.raises(errors.SelectionError, match="held-out"):
        xz_bits_per_byte(texts)


def test_unigram_by_hand():
    model = UnigramModel([[0, 0, 1], [0]], vocabulary_size=3)
    assert [model.probability(token) for token in range(3)] == [4 / 7, 2 / 7, 1 / 7]
    assert model.loss([[0, 1], [2]]) == pytest.approx(
        -(math.log(4 / 7) + math.log(2 / 7) + math.log(1 / 7)) / 3
    )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 19), max_size=30), max_size=10), st.integers(20, 50))
def test_unigram_is_a_distribution_and_no_worse_than_uniform_on_its_own_text(documents, size):
    model = UnigramModel(documents, size)
    assert math.fsum(model.probability(token) for token in range(size)) == pytest.approx(1.0)
    if any(documents):
        assert model.loss(documents) <= math.log(size) + 1e-12


def test_unigram_refuses_what_it_cannot_measure():
    with pytest.raises(errors.SelectionError, match="outside the vocabulary of 3"):
        UnigramModel([[3]], 3)
    with pytest.raises(errors.SelectionError, match="token -1"):
        UnigramModel([[0]], 3).loss([[-1]])
    with pytest.raises(errors.SelectionError, match="empty"):
        UnigramModel([[0]], 3).loss([[]])
    with pytest.raises(errors.SelectionError, match="at least one"):
        UnigramModel([], 0)
