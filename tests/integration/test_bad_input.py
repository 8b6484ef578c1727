"""Every mistake is one clear message, told before any work is lost."""

import subprocess
from pathlib import Path

import pytest

from .conftest import ROOT, Shell

FLOW = ROOT / "flows" / "train_flow.py"
DEMO = ROOT / "configs" / "demo.yaml"


def check_fails_saying(
    shell: Shell, *said: str, config: dict[str, str] | None = None, arguments=(), **environment
) -> str:
    """Runs the flow, which must fail with this message, without traceback, before anything was trained."""
    options = []
    if config:
        text = DEMO.read_text()
        for old, new in config.items():
            assert old in text
            text = text.replace(old, new)
        (shell.directory / "mine.yaml").write_text(text)
        options = ["--config", "config", "mine.yaml"]
    status, output = shell.run(FLOW, *options, "run", *arguments, **environment)
    assert status != 0, output
    for words in said:
        assert words in output, output
    assert "Traceback" not in output, output
    assert "step 1" not in output
    return output


def test_unknown_repository(shell: Shell, hub):
    check_fails_saying(
        shell,
        "RepositoryNotFoundError:",
        "'nobody/nothing'",
        "has no such repository",
        arguments=["--repo_id", "nobody/nothing"],
        HF_ENDPOINT=hub.url,
    )


def test_a_name_that_is_no_repository(shell: Shell):
    check_fails_saying(shell, "SelectionError:", "'a b'", "./directory", arguments=["--repo_id", "a b"])


def test_a_directory_that_does_not_exist(shell: Shell):
    check_fails_saying(
        shell,
        "ConfigError:",
        "model.repo_id: the directory '../etc' does not exist here",
        arguments=["--repo_id", "../etc"],
    )


def test_unknown_dataset(shell: Shell, hub):
    check_fails_saying(
        shell,
        "RepositoryNotFoundError:",
        "dataset 'nobody/nothing'",
        arguments=["--dataset", "hf://nobody/nothing"],
        HF_ENDPOINT=hub.url,
    )


def test_unknown_text_column(shell: Shell):
    check_fails_saying(
        shell,
        "FormatError:",
        "there is no column 'txet' (data.columns, text). Columns: text (text, e.g. ",
        config={"  batch_size: 4": "  batch_size: 4\n  text_column: txet"},
    )


def test_misspelt_keys_are_all_told_before_the_run_begins(shell: Shell):
    output = check_fails_saying(
        shell,
        "configuration: 2 mistakes",
        "data.bath_size: unknown key; did you mean 'batch_size'?",
        "optimizer.learning_rat: unknown key; did you mean 'learning_rate'?",
        config={"batch_size": "bath_size", "learning_rate": "learning_rat"},
    )
    assert "Workflow starting" not in output


def test_negative_number_of_gpus(shell: Shell):
    check_fails_saying(
        shell,
        "ConfigError:",
        "--num_gpus -1: give a number of branches, or 0",
        arguments=["--num_gpus", "-1"],
    )


def test_sequences_longer_than_the_model_knows(shell: Shell):
    output = check_fails_saying(
        shell,
        "ConfigError:",
        "data.sequence_length = 4,096 is more than the 2,048 positions of metaflow-hf/tiny-llama",
        config={"sequence_length: 256": "sequence_length: 4096"},
    )
    assert "/prepare/" not in output


def test_hub_not_reachable(shell: Shell, unused_endpoint: str):
    check_fails_saying(
        shell,
        "HubUnavailable:",
        f"the hub at {unused_endpoint} gave no usable answer",
        "try 2 in",
        config={"hub: embedded": f"hub: {unused_endpoint}"},
    )


def test_datastore_below_a_file(shell: Shell):
    (shell.directory / "file").write_text("in the way")
    output = check_fails_saying(
        shell,
        "StoreUnavailable:",
        "cannot be written",
        "is not a directory",
        METAFLOW_DATASTORE_SYSROOT_LOCAL=str(shell.directory / "file" / "store"),
    )
    assert "Workflow starting" not in output


def test_datastore_on_a_read_only_file_system(shell: Shell, tmp_path: Path):
    mount = tmp_path / "read-only"
    mount.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(mount)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("mounting a file system is not permitted here")
    try:
        check_fails_saying(
            shell,
            "StoreUnavailable:",
            "cannot be written: Read-only file system",
            METAFLOW_DATASTORE_SYSROOT_LOCAL=str(mount),
        )
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


@pytest.fixture
def unused_endpoint() -> str:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_nothing_to_generate_with(shell: Shell):
    status, output = shell.run(ROOT / "flows" / "generate_flow.py", "run")
    assert status != 0
    assert "SelectionError:" in output
    assert "TrainFlow has no trained model: run flows/train_flow.py to its end first." in output
    assert "Traceback" not in output
