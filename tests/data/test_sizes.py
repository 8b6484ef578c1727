"""Chunks fit the machine, as the table of recommendations says."""

import pytest

from metaflow_hf.data import sizes
from metaflow_hf.data.sizes import chunk_samples, token_chunk_size


@pytest.mark.parametrize(
    ("gib", "samples"), [(8, 1000), (15.6, 2000), (24, 2000), (31, 4000), (62, 8000), (512, 8000)]
)
def test_auto_follows_the_memory_and_says_so(gib, samples, caplog):
    caplog.set_level("INFO", "metaflow_hf.data")
    assert chunk_samples(int(gib * 2**30)) == samples
    assert f"{samples:,}" in caplog.text


def test_this_machine_has_some_answer():
    assert chunk_samples() >= 1000


@pytest.mark.parametrize(
    ("gib", "tokens"), [(6, 512), (9.8, 1024), (16, 1024), (19.6, 2048), (23.6, 4096), (139, 4096)]
)
def test_token_chunks_follow_the_gpu_and_say_so(gib, tokens, caplog):
    caplog.set_level("INFO", "metaflow_hf.data")
    assert token_chunk_size(int(gib * 2**30)) == tokens
    assert f"auto is {tokens:,} tokens ({gib:.1f} GiB of GPU memory)" in caplog.text


def test_token_chunks_are_alike_where_the_result_depends_on_them():
    assert token_chunk_size(None) == 2048
    assert token_chunk_size(8 * 2**30, exact=False) == token_chunk_size(80 * 2**30, exact=False) == 2048


def test_what_a_container_may_use_counts_and_is_said(monkeypatch, caplog):
    monkeypatch.setattr(sizes, "usable_memory", lambda: (2**30, "the container's limit"))
    caplog.set_level("INFO", "metaflow_hf.data")
    assert chunk_samples() == 1000
    assert "1.0 GiB of memory (the container's limit)" in caplog.text
