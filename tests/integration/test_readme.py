"""The README and the documents in docs/ are executable."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import ROOT, Shell

pytestmark = pytest.mark.timeout(600)


def test_its_commands_are_known(readme):
    """Each of them is run by a test: the first two and the last by ``make`` and ``test_demo``, the others by ``test_init``
    and ``test_plan``.
    """
    assert [command[:2] for command in readme.commands] == [
        ["make", "demo"],
        ["make", "test"],
        ["metaflow", "hf"],
        ["python", "flows/train_flow.py"],
        ["python", "flows/generate_flow.py"],
    ]
    assert re.search(r"^test:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_the_flow_of_ten_lines(shell: Shell, hub, readme):
    (flow,) = readme.python
    (shell.directory / "cache_flow.py").write_text(flow)
    output = shell.succeed("cache_flow.py", "run", HF_ENDPOINT=hub.url)
    assert "the files are in" in output
    with hub.log.new() as log:
        shell.succeed("cache_flow.py", "run", HF_ENDPOINT=hub.url)
    assert log.file_bytes() == 0


def test_the_folders_exist(readme):
    picture = (ROOT / "README.md").read_text().split("```text")[-1].partition("```")[0]
    parent = Path()
    for line in picture.strip().splitlines():
        name = line.split()[0]
        place = ROOT / (parent / name if line.startswith(" ") else name)
        assert place.exists(), name
        if not line.startswith(" "):
            parent = Path(name)


def test_it_is_one_screen():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 90


def blocks(document: str) -> list[tuple[str, str]]:
    """(language, text) of every block that a reader would run, in order."""
    return re.findall(
        r"^```(bash|python)\n(.*?)^```", (ROOT / "docs" / document).read_text(), re.DOTALL | re.MULTILINE
    )


# Documents whose examples need more than a hub are executed by tests of their own, which name them.
_TESTS = [path.read_text() for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__)]
DOCUMENTS = sorted(
    path.name
    for path in (ROOT / "docs").glob("*.md")
    if blocks(path.name) and not any(path.name in test for test in _TESTS)
)


def run_block(shell: Shell, language: str, text: str, **environment: str) -> str:
    """Runs one block as it stands; one whose first line is a comment with a file's name becomes that file."""
    first = text.partition("\n")[0]
    if language == "python" and re.fullmatch(r"# [a-z_]+\.py", first):
        (shell.directory / first.removeprefix("# ")).write_text(text)
        return ""
    command = ["bash", "-euo", "pipefail", "-c", text] if language == "bash" else [sys.executable, "-c", text]
    path = os.pathsep.join([str(Path(sys.executable).parent), shell.environment["PATH"]])
    done = subprocess.run(
        command,
        cwd=shell.directory,
        env={**shell.environment, "PATH": path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=250,
    )
    assert done.returncode == 0, f"{text}\n{done.stdout}"
    return done.stdout


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_block_of_a_document_runs(document: str, shell: Shell, hub):
    """One block after the other in one directory, with a hub on localhost where the real one would be."""
    for language, text in blocks(document):
        run_block(shell, language, text, HF_ENDPOINT=hub.url, HF_HUB_DISABLE_XET="1")


def test_what_is_in_a_block_is_run_or_shown_as_text():
    for path in (ROOT / "docs").glob("*.md"):
        languages = re.findall(r"^```(\w*)\n(?:.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)
        assert set(languages) <= {"bash", "python", "json", "text", "yaml"}, path.name


def test_the_documents_are_executed_and_name_benchmarks_that_are_there():
    assert "hub.md" in DOCUMENTS
    for path in (ROOT / "docs").glob("*.md"):
        for bench in re.findall(r"python (tests/bench/\S+)", path.read_text()):
            assert (ROOT / bench).exists(), f"{path.name}: {bench}"
