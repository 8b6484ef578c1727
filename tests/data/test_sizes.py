"""Chunks fit the machine, as the table of recommendations says."""

import pytest

from metaflow_hf.data.sizes import chunk_samples


@pytest.mark.parametrize(
    ("gib", "samples"), [(8, 1000), (15.6, 2000), (24, 2000), (31, 4000), (62, 8000), (512, 8000)]
)
def test_auto_follows_the_memory_and_says_so(gib, samples, caplog):
    caplog.set_level("INFO", "metaflow_hf.data")
    assert chunk_samples(int(gib * 2**30)) == samples
    assert f"{samples:,}" in caplog.text


def test_this_machine_has_some_answer():
    assert chunk_samples() >= 1000
