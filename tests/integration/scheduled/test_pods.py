"""The containers of these tests end with them, and share no signal with them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from schedulers.pods import require_namespaces

# Starts a container, says what runs in it, and waits.
TESTS = """
import sys, time
from pathlib import Path
from schedulers.images import Image
from schedulers.pods import Pod

root = Path(sys.argv[1])
command = ["sh", "-c", "sleep 600 & trap '' TERM; echo running; wait"]
pod = Pod(Image(root), root / "pod", command, {}, emissary=True)
while "running" not in pod.printed():
    assert pod.is_running(), pod.printed()
    time.sleep(0.01)
print(pod._process.pid, *pod.processes(), flush=True)
time.sleep(600)
"""


def runs(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return "\nState:\tZ" not in status


def test_a_container_ends_with_the_tests_that_were_killed(tmp_path: Path):
    require_namespaces()
    with subprocess.Popen(
        [sys.executable, "-c", TESTS, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as tests:
        try:
            pids = [int(word) for word in tests.stdout.readline().split()]
            # The maker of namespaces, the emissary, the shell, what it left in the background.
            assert len(pids) >= 4, (tmp_path / "pod.log").read_text()
            assert all(runs(pid) for pid in pids)
            assert os.getsid(pids[0]) == pids[0]
        finally:
            os.killpg(tests.pid, signal.SIGKILL)
    until = time.monotonic() + 60
    while alive := [pid for pid in pids if runs(pid)]:
        assert time.monotonic() < until, f"{alive} run on"
        time.sleep(0.01)
