"""Faults in real runs: killed at a write, damaged bytes, full and read-only disks, a token in sight."""

import hashlib
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from soak.contents import Bucket, Directory

# Four of each of the flow's two steps.
KILLS = {
    "disk": "before arrivals,after blobs,before manifests,after snapshots,"
    "before blobs,after checkpoints,before models,after models",
    "s3": "after leases,after arrivals,before blobs,after manifests,"
    "after blobs,before checkpoints,after checkpoints,before models",
}
ELSEWHERE = """
import sys
from pathlib import Path
from metaflow import delete_model, load_model
from metaflow_hf.errors import NotFound
[found] = Path(load_model(sys.argv[1])).glob("state")
print(found.name)
delete_model(sys.argv[1])
try:
    load_model(sys.argv[1])
except NotFound as error:
    print(type(error).__name__)
    assert "it was deleted" in str(error), error
"""


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_a_run_killed_at_its_writes_on_a_bad_day_of_the_hub(
    where, run_flow, hub, project: Path, tmp_path: Path, flow_environment, request
):
    datastore = request.getfixturevalue("s3_datastore") if where == "s3" else {}
    content = "/lfs/*/model.safetensors"
    hub.faults.fail_next(1, status=503, path="/api/models/gpt2/revision/*")
    hub.faults.fail_next(1, status=429, retry_after_seconds=1, path="/api/models/gpt2/tree/*")
    hub.faults.truncate_next(1, after_bytes=1000, path=content)
    hub.faults.corrupt_next(1, path=content)
    hub.faults.corrupt_next(1, path="/gpt2/*/config.json")
    hub.faults.drop_next(1, path="/gpt2/*/tokenizer.json")
    outcome = run_flow(
        "killed_writes_flow.py",
        "--kills",
        KILLS[where],
        before=[f"--datastore={'local' if where == 'disk' else 's3'}"],
        **datastore,
    )
    assert outcome.status == 0, outcome.output
    assert len(outcome.lines("Task is starting (retry)")) == 8
    assert not hub.faults.left()
    # Cut off, continued with wrong bytes, whole; and once more when a kill cut it off.
    assert 3 <= hub.log.count(path=content, method="GET") <= 4
    # As many attempts had saved a checkpoint before they were killed.
    before = 3 if where == "disk" else 2
    assert outcome.lines(f"in the end: version {before + 1}")
    assert outcome.lines(f"child saved {before + 2}")
    stored = _stored(project, datastore)
    for kind in ("manifests", "snapshots", "checkpoints", "models", "pins", "refs"):
        assert any(key.startswith(f"{kind}/") for key in stored), kind
    for key in stored:
        if key.startswith("blobs/"):
            assert hashlib.sha256(stored[key]).hexdigest() == key.rpartition("/")[2], key
    if where == "disk":
        return
    assert not list(project.rglob("mf.hf"))
    # Another machine: nothing is there but the bucket.
    elsewhere = {"METAFLOW_HF_CACHE": str(tmp_path / "elsewhere"), "METAFLOW_DEFAULT_DATASTORE": "s3"}
    [model] = [key for key in stored if key.startswith("models/")]
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, model],
        env={**flow_environment, **datastore, **elsewhere},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["state", "NotFound"]


def _stored(project: Path, datastore: dict[str, str]) -> Mapping[str, bytes]:
    if datastore:
        return Bucket(
            f"{datastore['METAFLOW_DATASTORE_SYSROOT_S3']}/mf.hf", datastore["METAFLOW_S3_ENDPOINT_URL"]
        )
    return Directory(project / ".metaflow" / "mf.hf")


def test_errors_are_caught_by_the_names_of_huggingface_hub_and_no_process_shows_the_token(
    run_flow, hub, project: Path
):
    hub.faults.fail_next(100, status=503, path="/api/models/microsoft/phi-2/tree/*")
    hub.faults.truncate_next(100, path="/distilbert-base-uncased/*/config.json")
    hub.faults.corrupt_next(100, path="/bert-base-uncased/*/config.json")
    outcome = run_flow("caught_flow.py")
    assert outcome.status == 0, outcome.output
    # Nothing of them is to be seen.
    for name in ("phi-2", "distilbert-base-uncased", "bert-base-uncased"):
        assert not list(project.glob(f".metaflow/mf.hf/manifests/**/*{name}*/**/*.json")), name
    for name, *words in (
        ("RepositoryNotFoundError", "'no/such' at revision 'main'", "repo_type"),
        ("RepositoryNotFoundError", "'acme/private-model'", "HF_TOKEN"),
        ("RevisionNotFoundError", "'gpt2' at revision 'v9'", "spelling"),
        ("GatedRepoError", "'acme/gated-model'", "HF_TOKEN"),
        ("RemoteEntryNotFoundError|EntryNotFoundError", "'none.json'", "gpt2"),
        ("HubUnavailable", "the files of model 'microsoft/phi-2'", "HTTP 503", "HF_ENDPOINT"),
        ("HubUnavailable", "'config.json' of model 'distilbert-base-uncased'", "5 tries", "HF_ENDPOINT"),
        ("IntegrityError", "'config.json' of model 'bert-base-uncased'", "arrived damaged 3 times"),
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
