"""A hub that fails: answers that come late, broken, wrong, or not at all."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from metaflow_hf.errors import HubUnavailable, IntegrityError
from metaflow_hf.hub.client import HubClient, RetryPolicy
from metaflow_hf.hub.pace import Pace
from metaflow_hf.hub.request import SnapshotRequest
from metaflow_hf.store.models import find_manifest

IMPATIENT = RetryPolicy(attempts=3, seconds=20, first_wait_seconds=0.01, max_wait_seconds=0.05)
SHARD = "*model-00003-of-00004.safetensors"


def test_busy_and_broken_answers_are_asked_for_again(own_hub, snapshots, request_for):
    own_hub.faults.fail_next(1, status=503, path="/api/*/revision/*")
    own_hub.faults.fail_next(1, status=429, retry_after_seconds=0, path="/api/*/tree/*")
    own_hub.faults.fail_next(1, status=500, path=SHARD)
    for path in ("/api/*/auth-check", "*/README.md", "*00001-of*", "*00004-of*"):
        own_hub.faults.drop_next(1, path=path, method="GET")
    assert snapshots().ensure(request_for()).num_files == 7
    # Every fault was met.
    for path in ("/api/*/auth-check", "*/README.md", "*00001-of*"):
        assert own_hub.log.count(path=path, method="GET") >= 2, path


def test_retry_after_is_respected(own_hub, snapshots, request_for):
    own_hub.faults.fail_next(1, status=429, retry_after_seconds=1, path="/api/*/revision/*")
    began = time.monotonic()
    snapshots().resolve(request_for())
    assert time.monotonic() - began >= 1.0


def test_retry_after_is_respected_for_files_too(own_hub, snapshots, request_for):
    for path in (SHARD, "*/config.json"):
        own_hub.faults.fail_next(1, status=429, retry_after_seconds=1, path=path)
    began = time.monotonic()
    assert snapshots().ensure(request_for(max_workers=1)).num_files == 7
    assert time.monotonic() - began >= 2.0


@pytest.mark.parametrize("path", ["/api/*/revision/*", "/api/*/tree/*", "*/config.json", SHARD])
def test_a_hub_that_accepts_and_never_answers(own_hub, snapshots, request_for, store, monkeypatch, path: str):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)

    def client(request: SnapshotRequest) -> HubClient:
        return HubClient(request.endpoint, retry=IMPATIENT, timeout_seconds=0.2)

    gate = own_hub.faults.hold_next(100, path=path)
    try:
        with pytest.raises(HubUnavailable, match=r"Timeout.*HF_ENDPOINT") as caught:
            snapshots(client=client).ensure(request_for(max_workers=1))
    finally:
        gate.open()
    assert "\n" not in str(caught.value)
    assert own_hub.log.count(path=path) <= IMPATIENT.attempts
    assert list(store.list("manifests")) == []


@pytest.mark.parametrize("path", ["/api/*/revision/*", "/api/*/tree/*", "*/config.json", SHARD])
def test_a_body_that_trickles_is_cut_off_and_asked_for_again(own_hub, snapshots, request_for, path: str):
    def client(request: SnapshotRequest) -> HubClient:
        return HubClient(request.endpoint, retry=IMPATIENT, pace=Pace(bytes_per_second=10_000, seconds=0.2))

    own_hub.faults.trickle_next(1, path=path, seconds=0.05)
    assert snapshots(client=client).ensure(request_for(max_workers=1)).num_files == 7
    assert own_hub.log.count(path=path, method="GET") >= 2
    own_hub.faults.trickle_next(100, path=path, seconds=0.05)
    with pytest.raises(HubUnavailable, match=r"TooSlow: \d+ bytes in .*HF_ENDPOINT"):
        snapshots(client=client).ensure(request_for(max_workers=1, force_download=True))


def test_retries_are_bounded_and_end_in_one_clear_line(own_hub, snapshots, request_for):
    own_hub.faults.fail_next(100, status=503, path="/api/*/revision/*")
    with pytest.raises(HubUnavailable, match=r"HTTP 503.*3 tries.*HF_ENDPOINT") as caught:
        snapshots().ensure(request_for())
    assert own_hub.log.count(path="*/revision/main") == 3
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ConnectionError)


def test_a_hub_that_is_down_is_named(snapshots, request_for, own_hub):
    own_hub.close()
    with pytest.raises(HubUnavailable, match="127.0.0.1"):
        snapshots().ensure(request_for())


def test_something_else_at_the_endpoint_is_said(snapshots, request_for, own_hub):
    with pytest.raises(HubUnavailable, match="not a Hugging Face hub"):
        snapshots().ensure(request_for(endpoint=own_hub.storage_url))


def test_a_truncated_body_is_continued(own_hub, snapshots, request_for, read_tree, files, tmp_path: Path):
    own_hub.faults.truncate_next(1, after_bytes=100_000, path=SHARD)
    reference = snapshots().ensure(request_for())
    assert read_tree(snapshots().load(reference, tmp_path / "out")) == files


def test_wrong_bytes_are_asked_for_again(own_hub, snapshots, request_for, read_tree, files, tmp_path: Path):
    own_hub.faults.corrupt_next(1, path=SHARD)
    own_hub.faults.corrupt_next(1, path="*/config.json")
    reference = snapshots().ensure(request_for())
    assert read_tree(snapshots().load(reference, tmp_path / "out")) == files


@pytest.mark.parametrize("path", [SHARD, "*/config.json"])
def test_wrong_bytes_of_the_right_size_never_enter_the_store(
    own_hub, snapshots, request_for, store, tmp_path: Path, path: str
):
    own_hub.faults.corrupt_next(100, path=path)
    with pytest.raises(IntegrityError, match=r"arrived damaged 3 times.*HF_ENDPOINT"):
        snapshots().ensure(request_for())
    assert list(store.list("manifests")) == []
    own_hub.faults.clear()
    reference = snapshots().ensure(request_for())
    for file in find_manifest(store, reference)[1].files:
        store.download(file.blob, tmp_path / "blob", expected=file.digest)


def test_what_was_brought_before_a_failure_is_not_brought_again(own_hub, snapshots, request_for, files):
    own_hub.faults.fail_next(100, status=500, path=SHARD)
    with pytest.raises(HubUnavailable):
        snapshots().ensure(request_for(max_workers=1))
    own_hub.faults.clear()
    with own_hub.log.new() as log:
        snapshots().ensure(request_for(max_workers=1))
    assert log.file_bytes(path="*00001-of*") == log.file_bytes(path="*00002-of*") == 0
    assert log.file_bytes(path=SHARD) == len(files["model-00003-of-00004.safetensors"])


def test_a_pre_filled_cache_of_huggingface_hub_is_used_after_verification(
    own_hub, snapshots, request_for, read_tree, files, tmp_path: Path
):
    from huggingface_hub import snapshot_download

    snapshot_download("acme/model", endpoint=own_hub.url, cache_dir=os.environ["HF_HUB_CACHE"])
    commit = own_hub.content.repo("acme/model").resolve()
    damaged = Path(
        os.environ["HF_HUB_CACHE"], "models--acme--model", "blobs", commit.files["config.json"].oid
    )
    damaged.write_bytes(b"x" * len(files["config.json"]))
    with own_hub.log.new() as log:
        reference = snapshots().ensure(request_for())
    assert log.file_bytes() == len(files["config.json"])
    assert read_tree(snapshots().load(reference, tmp_path / "out")) == files


INTERRUPTED = """
import logging, signal, sys
from pathlib import Path
from metaflow_hf.hub.request import SnapshotRequest
from metaflow_hf.hub.snapshots import Snapshots
from metaflow_hf.store import open_store
from metaflow_hf.store.node_cache import NodeCache

# Whoever runs the tests in the background of a shell hands on that it is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
logging.basicConfig(format="%(message)s")
snapshots = Snapshots(open_store(sys.argv[1]), NodeCache(Path(sys.argv[2])), lease_seconds=1.0)
print(snapshots.ensure(SnapshotRequest.of("acme/model", max_workers=2)).num_files)
"""


def test_an_interrupted_download_ends_at_once_and_is_resumed(own_hub, files, tmp_path: Path):
    held = own_hub.faults.hold_next(2, path="/lfs/*", method="GET")

    def start() -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-c", INTERRUPTED, str(tmp_path / "store"), str(tmp_path / "node")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "HF_HUB_DISABLE_XET": "1"},
        )

    process = start()
    assert held.wait_until_held()
    process.send_signal(signal.SIGINT)
    # Said while both transfers still hang.
    line = next(line.strip() for line in process.stderr if "interrupted" in line)
    held.open()
    _, errors = process.communicate(timeout=100)
    assert process.returncode != 0
    assert "interrupted" not in errors
    assert line.startswith("interrupted at acme/model@")
    assert line.endswith("run again on this machine to resume")
    assert own_hub.log.count(path="*00004-of*") == 0
    assert list((tmp_path / "store").glob("manifests/**/*.json")) == []
    # The transfers were cut, not waited for.
    assert [path for path in (tmp_path / "store").glob("blobs/*/*") if path.stat().st_size == 300_000] == []
    with own_hub.log.new() as log:
        output, errors = start().communicate(timeout=100)
    assert output.strip() == "7", errors
    assert log.file_bytes() < sum(map(len, files.values()))


def test_a_failed_file_stops_the_others(own_hub, snapshots, request_for):
    own_hub.faults.fail_next(100, status=404, path="*/config.json")
    # Time enough for the failure, and three of them come before the last shard.
    own_hub.faults.delay_next(4, seconds=1.0, path="/lfs/*")
    with pytest.raises(HubUnavailable):
        snapshots().ensure(request_for(max_workers=2))
    assert own_hub.log.count(path="*00004-of*") == 0
