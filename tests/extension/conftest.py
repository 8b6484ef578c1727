"""Flows as people run them: `python flow.py run` in an empty directory, against the tests' hub."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

FLOWS = Path(__file__).parent / "flows"


@dataclass(frozen=True)
class Outcome:
    """How a process ended and what it printed, both streams in one."""

    status: int
    output: str

    def lines(self, *words: str) -> list[str]:
        return [line for line in self.output.splitlines() if all(word in line for word in words)]


RunFlow = Callable[..., Outcome]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs are a dozen processes, one after the other: minutes on a machine that is busy otherwise."""
    for item in items:
        if item.path.is_relative_to(FLOWS.parent) and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(300))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    directory = tmp_path / "project"
    directory.mkdir()
    return directory


@pytest.fixture
def flow_environment(
    hub, subprocess_environment: dict[str, str], project: Path, tmp_path: Path
) -> dict[str, str]:
    """The environment of a flow's process, with a home and a datastore of its own: without one that it is told, Metaflow
    takes a `.metaflow` of any folder above.
    """
    home = {"HOME": str(tmp_path), "METAFLOW_HOME": str(tmp_path / "metaflow-home"), "NO_COLOR": "1"}
    return {**subprocess_environment, **home, "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(project)}


@pytest.fixture
def run_flow(flow_environment: dict[str, str], project: Path) -> RunFlow:
    """Runs a flow (a name below `flows/`, or a path) with `run` (or another command) and more arguments; environment by
    keyword. `before` are arguments in front of the command, `python` is another interpreter.
    """

    def run(
        flow: str | Path,
        *arguments: str,
        command: str = "run",
        before: Sequence[str] = (),
        python: str = sys.executable,
        **environment: str,
    ) -> Outcome:
        path = flow if isinstance(flow, Path) else FLOWS / flow
        done = subprocess.run(
            [python, str(path), *before, command, *arguments],
            cwd=project,
            env={**flow_environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=250,
            check=False,
        )
        return Outcome(done.returncode, done.stdout)

    return run
