"""Faults in real runs: killed at a write, damaged bytes, full and read-only disks, a token in sight."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


def test_a_task_killed_at_its_writes_ends_with_everything_whole(run_flow, hub):
    kills = ["after blobs", "before manifests", "after checkpoints", "before models"]
    with hub.log.new() as log:
        outcome = run_flow("killed_writes_flow.py", "--kills", ",".join(kills))
    assert outcome.status == 0, outcome.output
    assert len(outcome.lines("Task is starting (retry)")) == len(kills)
    assert outcome.lines(f"attempt {len(kills)} ended")
    # Two attempts had saved a checkpoint before they were killed.
    assert outcome.lines("in the end: version 3")
    # What was stored is not asked for again; what the first kill cut off is, once.
    assert log.count(path="/lfs/*/model.safetensors", method="GET") <= 2


def test_errors_are_caught_by_the_names_of_huggingface_hub_and_no_process_shows_the_token(run_flow):
    outcome = run_flow("caught_flow.py")
    assert outcome.status == 0, outcome.output
    for name, *words in (
        ("RepositoryNotFoundError", "'no/such' at revision 'main'", "repo_type"),
        ("RepositoryNotFoundError", "'acme/private-model'", "HF_TOKEN"),
        ("RevisionNotFoundError", "'gpt2' at revision 'v9'", "spelling"),
        ("GatedRepoError", "'acme/gated-model'", "HF_TOKEN"),
        ("RemoteEntryNotFoundError|EntryNotFoundError", "'none.json'", "gpt2"),
    ):
        assert any(re.search(f"caught ({name}): ", line) for line in outcome.lines(*words)), (
            f"{name}\n{outcome.output}"
        )
    assert outcome.lines("processes show the token: False, this flow: True")
    assert "hf_reader" not in outcome.output


def headline(outcome, name: str) -> str:
    """What the user reads first: one line of what, where, what to do, and no traceback at all."""
    assert outcome.status != 0, outcome.output
    assert "Traceback" not in outcome.output, outcome.output
    assert len(outcome.lines(f" {name}:")) == 1, outcome.output
    return outcome.output.partition(f" {name}:\n")[2].splitlines()[0]


def test_a_damaged_model_says_which_file_of_which_key_and_what_to_do(run_flow, project: Path, tmp_path: Path):
    first = run_flow("load_key_flow.py")
    assert first.status == 0, first.output
    key = re.search(r"saved (\S+)", first.output)[1]
    source = (Path(__file__).parent / "flows" / "load_key_flow.py").read_bytes()
    [blob] = [path for path in (project / ".metaflow/mf.hf/blobs").glob("*/*") if path.read_bytes() == source]
    blob.chmod(0o644)
    blob.write_bytes(bytes([source[0] ^ 1]) + source[1:])
    said = headline(
        run_flow("load_key_flow.py", "--key", key, METAFLOW_HF_CACHE=str(tmp_path / "other-node")),
        "IntegrityError",
    )
    for words in ("'load_key_flow.py'", key, "sha256", "save the same files again", f"models rm {key}"):
        assert words in said


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB, which only root can mount."""
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system is not permitted here")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def test_full_and_read_only_disks_are_named_with_a_way_out(run_flow, small_disk: Path):
    (small_disk / "fill").write_bytes(bytes(60_000))
    said = headline(
        run_flow("load_key_flow.py", METAFLOW_HF_CACHE=str(small_disk / "node")), "StoreUnavailable"
    )
    assert str(small_disk / "node") in said
    assert "METAFLOW_HF_CACHE" in said
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    root = {"METAFLOW_DATASTORE_SYSROOT_LOCAL": str(small_disk)}
    said = headline(run_flow("load_key_flow.py", **root), "StoreUnavailable")
    assert "Read-only file system" in said
    assert "METAFLOW_DATASTORE_SYSROOT_LOCAL" in said
