"""Flows as people run them: real processes in an empty directory, with an empty home."""

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Shell:
    """Runs this environment's Python in one directory, as a user who just installed the package would."""

    directory: Path
    environment: dict[str, str]

    def start(self, *arguments: str | Path, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=self.directory,
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str | Path, timeout: float = 110, **environment: str) -> tuple[int, str]:
        """Exit status and output, stdout and stderr in one."""
        process = self.start(*arguments, **environment)
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            pytest.fail(f"timed out after {timeout} s:\n{output}")
        return process.returncode, output

    def succeed(self, *arguments: str | Path, timeout: float = 110, **environment: str) -> str:
        status, output = self.run(*arguments, timeout=timeout, **environment)
        assert status == 0, output
        return output


def make_shell(root: Path) -> Shell:
    """A user's directory, home and datastore below ``root``."""
    directory, home = root / "project", root / "home"
    directory.mkdir()
    home.mkdir()
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
    environment = {
        **kept,
        "HOME": str(home),
        "METAFLOW_USER": "tester",
        "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(directory),
        "METAFLOW_HF_CACHE": str(root / "cache"),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_COLOR": "1",
        # Other tests are at work on the other cores.
        "OMP_NUM_THREADS": "1",
    }
    return Shell(directory, environment)


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return make_shell(tmp_path)


def readme_blocks(language: str) -> list[str]:
    """The code blocks of one language in the README, in order."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def readme_commands() -> list[list[str]]:
    """Every command of the README's shell blocks, as its words."""
    lines = [line.partition("#")[0].strip() for block in readme_blocks("bash") for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line]


@pytest.fixture(scope="session")
def readme() -> SimpleNamespace:
    """What the README tells people to run."""
    return SimpleNamespace(commands=readme_commands(), python=readme_blocks("python"))


@pytest.fixture(scope="session")
def check_lineage() -> Callable[[Path], list[dict]]:
    """Checks a lineage from the JSON in its store, without any code of the library, and returns its rounds."""
    return _check_lineage


def _positions(ranges: list[list[int]]) -> list[int]:
    return [position for start, stop in ranges for position in range(start, stop)]


def _check_lineage(directory: Path) -> list[dict]:
    spec = json.loads((directory / "spec.json").read_text())
    paths = sorted((directory / "rounds").iterdir())
    rounds = [json.loads(path.read_text()) for path in paths]
    assert [manifest["round"] for manifest in rounds] == list(range(len(rounds)))
    done: list[int] = []
    tokens = 0
    for path, manifest, following in zip(paths, rounds, [*rounds[1:], None], strict=True):
        for accepted in manifest["accepted"]:
            done += _positions(accepted["positions"])
            tokens += accepted["tokens"]
        assert sorted(done) == _positions(manifest["done"])
        assert tokens == manifest["tokens"]
        if following is not None:
            assert following["parent"] == hashlib.sha256(path.read_bytes()).hexdigest()
            assert not manifest["final"]
    assert len(done) == len(set(done)), "a position was trained twice"
    assert set(done) <= set(range(spec["num_positions"]))
    last = rounds[-1]
    assert last["final"]
    if spec["max_tokens"] is None or last["tokens"] < spec["max_tokens"]:
        assert len(done) == spec["num_positions"], "a position is missing"
    return rounds
