"""``metaflow hf demo-hub`` as people call it."""

import signal
import socket
import subprocess
import sys
import urllib.request
from contextlib import closing

import pytest

METAFLOW = [sys.executable, "-u", "-c", "from metaflow.cmd.main_cli import start; start()"]


def metaflow(*arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*METAFLOW, *arguments], env=environment, text=True, capture_output=True, check=False, timeout=100
    )


def test_the_group_lists_its_commands(subprocess_environment):
    done = metaflow("hf", "--help", environment=subprocess_environment)
    assert done.returncode == 0
    assert "demo-hub" in done.stdout + done.stderr


def test_an_unknown_command_is_one_clear_line(subprocess_environment):
    done = metaflow("hf", "demo-hbu", environment=subprocess_environment)
    assert done.returncode != 0
    assert "No such command" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("fixtures", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_it_is_told_to_stop(subprocess_environment, fixtures, number):
    command = [
        sys.executable,
        "-u",
        "-c",
        "from metaflow.cmd.main_cli import start; start()",
        "hf",
        "demo-hub",
    ]
    command += ["--fixtures"] if fixtures else []
    with subprocess.Popen(command, env=subprocess_environment, text=True, stdout=subprocess.PIPE) as process:
        printed = []
        for line in process.stdout:
            printed.append(line.strip())
            if line.startswith("Ctrl-C"):
                break
        url = next(line.split()[-1] for line in printed if line.startswith("The hub is at"))
        with urllib.request.urlopen(f"{url}/api/models") as answer:
            assert answer.status == 200
        process.send_signal(number)
        rest = process.stdout.read()
        assert process.wait(timeout=60) == 0
    assert rest.strip() == "stopped"
    assert any(f"HF_ENDPOINT={url}" in line for line in printed)
    assert "metaflow-hf/tiny-llama" in printed
    assert ("bert-base-uncased" in printed) is fixtures


def test_a_taken_port_is_one_clear_line(subprocess_environment):
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = metaflow("hf", "demo-hub", "--port", port, environment=subprocess_environment)
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr
