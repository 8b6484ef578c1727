"""A container as a process: an empty home, a `/tmp` and a `/mnt` of its own, its image's Python, and no sight of this
checkout. Linux namespaces do it, which ordinary users may make on most systems.
"""

import functools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from .images import IMAGE, Image

CHECKOUT = Path(__file__).resolve().parents[2]
HOME, WORK, OUT = "/mnt/home", "/mnt/work", "/mnt/out"

# Process 1 of the container. Everything is found before anything is hidden, /tmp last: pods live there.
_ENTER = """
set -e
pod=$1 image=$2 packages=$3 checkout=$4; shift 4
mkdir -p $pod/tmp $pod/nothing $pod/mnt/image $pod/mnt/packages $pod/mnt/home $pod/mnt/work $pod/mnt/out
mount --make-rprivate /
mount --bind $pod/mnt /mnt
mount --bind $image /mnt/image
mount --bind $packages /mnt/packages
mount --bind $pod/nothing $checkout
mount --bind $pod/tmp /tmp
mount -t proc proc /proc
cd /mnt/work
exec "$@"
"""

# What Argo puts before a container's command: signals go to the command's whole process group, and the container ends
# when the command does, whoever of its children is still at work.
_EMISSARY = """
import os, signal, subprocess, sys
command = subprocess.Popen(sys.argv[1:], process_group=0)
signal.signal(signal.SIGTERM, lambda number, _: os.killpg(command.pid, number))
status = command.wait()
sys.exit(status if status >= 0 else 128 - status)
"""


@functools.cache
def require_namespaces() -> None:
    """Skips the test where the kernel does not let this user make containers."""
    made = subprocess.run([*_unshare(), "true"], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"containers cannot be made here: {made.stderr.strip()}")


class Pod:
    """One container, running from the start. `root` keeps its files; `log` has what it printed."""

    def __init__(
        self,
        image: Image,
        root: Path,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        emissary: bool = False,
    ) -> None:
        self.root, self.log = root, root.with_suffix(".log")
        root.mkdir(parents=True)
        start = [sys.executable, "-ISc", _EMISSARY] if emissary else []
        if emissary:
            # The environment that runs the tests cannot be seen inside.
            start[0] = os.path.realpath(sys.executable)
        with self.log.open("wb") as log:
            # A session of its own: what is sent to the group of the tests is not also the pod's.
            self._process = subprocess.Popen(
                [
                    *_unshare(),
                    *("sh", "-c", _ENTER, "sh", root, image.root, Image.packages(), CHECKOUT),
                    *start,
                    *command,
                ],
                env={"PATH": f"{IMAGE}/bin:/usr/local/bin:/usr/bin:/bin", "HOME": HOME, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, timeout: float | None = None) -> int:
        """The exit status; a container that is still there after `timeout` seconds is killed, as for a deadline."""
        try:
            status = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            status = self._process.wait()
        if status == 0:
            shutil.rmtree(self.root / "mnt" / "work")
        return status

    def is_running(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """The machine is gone, or the kernel took the memory back: nobody is told. Process 1 of the container dies with
        the one that made it, and all others with process 1.
        """
        self._process.kill()

    def evict(self, grace_seconds: float, *, notice: bool = False) -> None:
        """Process 1 is told to end, and everything killed `grace_seconds` later. With `notice` the cloud said so
        before, in the file where Metaflow's monitor of spot instances writes it.
        """
        if notice:
            (self.root / "tmp" / "spot_termination_notice").write_text("soon")
        else:
            self._signal_process_1(signal.SIGTERM)
        try:
            self._process.wait(grace_seconds)
        except subprocess.TimeoutExpired:
            self.kill()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Everything in it stands still meanwhile, as on a machine that is overloaded."""
        self._signal_all(signal.SIGSTOP)
        try:
            yield
        finally:
            self._signal_all(signal.SIGCONT)

    def output(self, path: str) -> str:
        """What the container left in a file below /mnt/out."""
        return (self.root / path.removeprefix("/")).read_text()

    def printed(self) -> str:
        return self.log.read_text(errors="replace")

    def _signal_process_1(self, number: int) -> None:
        for child in _children(self._process.pid):
            os.kill(child, number)

    def _signal_all(self, number: int) -> None:
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def processes(self) -> Iterator[int]:
        """What runs in it, as seen from outside."""
        waiting = _children(self._process.pid)
        while waiting:
            pid = waiting.pop()
            waiting += _children(pid)
            yield pid


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


# Called with every container that starts: itself, the step, the index of its branch, the attempt.
Watch = Callable[[Pod, str, int, int], None]


def ignore(pod: Pod, step: str, index: int, attempt: int) -> None:
    """Nobody watches."""


def _unshare() -> list[str]:
    """Namespaces that the kernel empties when the thread ends that made them, so with the tests, however these end."""
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    die = ["setpriv", "--pdeathsig", "KILL"]
    return [*die, "unshare", *user, "--mount", "--pid", "--fork", "--kill-child"]


def tail(text: str, lines: int = 60) -> str:
    return "\n".join(text.splitlines()[-lines:])
