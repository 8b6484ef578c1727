"""Memory that a process may use: the machine's, or what its container is allowed."""

from pathlib import Path

import pytest

from metaflow_hf.machine import usable_memory


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
def test_the_limit_of_a_container_counts(tmp_path, lines, limits):
    root = control_groups(tmp_path, lines, limits)
    assert usable_memory(root) == (2**30, "the container's limit")


@pytest.mark.parametrize("limit", ["max\n", f"{2**63 - 4096}\n"])
def test_no_limit_is_the_whole_machine(tmp_path, limit):
    root = control_groups(tmp_path, "0::/\n", {"sys/fs/cgroup/memory.max": limit})
    assert usable_memory(root)[1] == usable_memory(tmp_path / "no such place")[1] == "the machine's"
