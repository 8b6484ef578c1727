"""What `make` says on machines where it cannot work, and that it mends what was interrupted."""

import os
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PASSING = {"--version": "Python 3.11.0"}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The Makefile beside what it depends on, without an environment."""
    place = tmp_path / "checkout"
    place.mkdir()
    for name in ("Makefile", "pyproject.toml", "setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, place / name)
    return place


def make(checkout: Path, target: str, **variables: str) -> tuple[int, str]:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))
    }
    done = subprocess.run(
        ["make", target, *(f"{name}={value}" for name, value in variables.items() if name == "PYTHON")],
        cwd=checkout,
        env={**environment, **{name: value for name, value in variables.items() if name != "PYTHON"}},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def only_line(output: str) -> str:
    """The one line that is not make's own."""
    (line,) = [line for line in output.splitlines() if line and not line.startswith("make")]
    return line


def test_no_python_or_an_old_one(checkout: Path, tmp_path: Path):
    old = script(
        tmp_path / "python3.9",
        f'exec {sys.executable} -c "import sys; sys.version_info = (3, 9, 1); exec(sys.argv[1])" "$2"',
    )
    for python in (old, str(tmp_path / "no-such-python")):
        status, output = make(checkout, "demo", PYTHON=python)
        assert status != 0
        assert only_line(output).startswith(f"metaflow-hf needs Python 3.11 or newer as '{python}'")
        assert not (checkout / ".venv").exists()


def test_python_without_venv(checkout: Path, tmp_path: Path):
    bare = script(
        tmp_path / "python3", f'case "$2" in *ensurepip*) exit 1;; esac; exec {sys.executable} "$@"'
    )
    status, output = make(checkout, "demo", PYTHON=bare)
    assert status != 0
    assert "cannot make virtual environments" in only_line(output)
    assert "apt install python3-venv" in output


def test_a_directory_that_cannot_be_written(checkout: Path):
    (checkout / ".venv").write_text("a file in the way")
    status, output = make(checkout, "demo", PYTHON=sys.executable)
    assert status != 0
    assert "could not be made here" in output
    assert "Traceback" not in output


def test_no_network_and_taking_it_up_again(checkout: Path):
    offline = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}
    status, output = make(checkout, "demo", PYTHON=sys.executable, **offline)
    assert status != 0
    assert "The installation failed (whole log: .venv/install.log). Is the package index reachable?" in output
    assert "Traceback" not in output
    assert len(output.splitlines()) <= 5
    assert not (checkout / ".venv" / "installed-base").exists()

    # An installation that never ended is begun anew, in an empty environment.
    (checkout / ".venv" / "half-installed").touch()
    make(checkout, "demo", PYTHON=sys.executable, **offline)
    assert not (checkout / ".venv" / "half-installed").exists()

    # A finished one is left alone.
    (checkout / ".venv" / "installing").rename(checkout / ".venv" / "installed-base")
    status, output = make(checkout, ".venv/installed-base", PYTHON=sys.executable, **offline)
    assert status == 0
    assert "Installing" not in output


@pytest.mark.parametrize(
    ("goals", "markers"),
    [
        (["test"], ["not acceptance"]),
        (["acceptance"], ["acceptance"]),
        (["test", "acceptance"], [None]),
        (["acceptance", "test"], [None]),
    ],
)
def test_both_kinds_of_tests_are_one_session_when_both_are_asked_for(goals, markers):
    printed = subprocess.run(["make", "-n", *goals], cwd=ROOT, capture_output=True, text=True, check=True)
    sessions = [shlex.split(line) for line in printed.stdout.splitlines() if "-m pytest" in line]
    assert [words[words.index("-m", 3) + 1] if "-m" in words[3:] else None for words in sessions] == markers
