"""Chunks fit the machine, as the table of recommendations says."""

from pathlib import Path

import pytest

from metaflow_hf.data import sizes
from metaflow_hf.data.sizes import chunk_samples, token_chunk_size, usable_memory


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


def control_groups(root: Path, lines: str, limits: dict[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": lines, **limits}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("lines", "limits"),
    [
        ("0::/\n", {"sys/fs/cgroup/memory.max": "1073741824\n"}),
        # Set on a group around the one of this process.
        (
            "0::/pod/task\n",
            {
                "sys/fs/cgroup/memory.max": "max\n",
                "sys/fs/cgroup/pod/memory.max": "1073741824\n",
                "sys/fs/cgroup/pod/task/memory.max": "max\n",
            },
        ),
        # The path that the kernel tells is that of the host, the files are the container's.
        ("0::/kubepods/burstable/abc\n", {"sys/fs/cgroup/memory.max": "1073741824\n"}),
        (
            "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n",
            {"sys/fs/cgroup/memory/memory.limit_in_bytes": "1073741824\n"},
        ),
    ],
)
def test_the_limit_of_a_container_counts(tmp_path, lines, limits, monkeypatch, caplog):
    root = control_groups(tmp_path, lines, limits)
    assert usable_memory(root) == (2**30, "the container's limit")
    monkeypatch.setattr(sizes, "usable_memory", lambda: usable_memory(root))
    caplog.set_level("INFO", "metaflow_hf.data")
    assert chunk_samples() == 1000
    assert "1.0 GiB of memory (the container's limit)" in caplog.text


@pytest.mark.parametrize("limit", ["max\n", f"{2**63 - 4096}\n"])
def test_no_limit_is_the_whole_machine(tmp_path, limit):
    root = control_groups(tmp_path, "0::/\n", {"sys/fs/cgroup/memory.max": limit})
    assert usable_memory(root)[1] == usable_memory(tmp_path / "no such place")[1] == "the machine's"
