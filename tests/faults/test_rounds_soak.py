"""Trainings by real processes under kills, stops and outages, judged by what lies in the store afterwards."""

import random
import threading
from pathlib import Path

import pytest
from soak.chaos import Chaos
from soak.contents import Bucket, Directory
from soak.recompute import RecomputingAuditor
from soak.trainings import NUM_POSITIONS, Training

KILLS_ON_DISK = 12
KILLS_ON_S3 = 8
OUTAGE_SECONDS = 30


@pytest.fixture
def on_disk(tmp_path: Path):
    training = Training(root=tmp_path, store=str(tmp_path / "store"))
    training.prepare()
    yield training
    training.kill_all()


@pytest.fixture
def on_s3(tmp_path: Path, s3_root: str, s3_environment: dict[str, str]):
    training = Training(root=tmp_path, store=s3_root, environment=s3_environment)
    training.prepare()
    yield training
    training.kill_all()


def audit(contents) -> RecomputingAuditor:
    auditor = RecomputingAuditor(NUM_POSITIONS)
    auditor.look(contents)
    assert auditor.newest["final"]
    assert auditor.newest["done"] == [[0, NUM_POSITIONS]]
    return auditor


@pytest.mark.timeout(600)
def test_processes_hurt_at_random_on_disk(on_disk):
    chaos = Chaos(training=on_disk, rng=random.Random(1), faults_left=KILLS_ON_DISK)
    chaos.run()
    assert sum(chaos.done.values()) >= KILLS_ON_DISK - 2
    audit(Directory(Path(on_disk.store)))


@pytest.mark.timeout(600)
def test_processes_hurt_at_random_on_s3(on_s3, s3_server):
    chaos = Chaos(training=on_s3, rng=random.Random(2), faults_left=KILLS_ON_S3)
    chaos.run()
    assert sum(chaos.done.values()) >= KILLS_ON_S3 - 2
    audit(Bucket(on_s3.store, s3_server.url))


@pytest.mark.timeout(600)
def test_a_store_that_is_away_for_half_a_minute_costs_time_and_nothing_else(on_s3, s3_server):
    workers = on_s3.start(2)
    for worker in workers:
        worker.await_claims(3)
    # Who comes while a round is closed begins with the next.
    lost = [worker.events.count("WorkLost") for worker in workers]
    with s3_server.away():
        threading.Event().wait(OUTAGE_SECONDS)
    assert [worker.end(200) for worker in workers] == [0, 0]
    auditor = audit(Bucket(on_s3.store, s3_server.url))
    assert not any(manifest["failures"] for manifest in auditor.manifests)
    assert [worker.events.count("WorkLost") for worker in workers] == lost


def test_the_auditor_sees_a_weight_that_nobody_trained(on_disk):
    for worker in on_disk.start(2):
        assert worker.end() == 0
    store = Path(on_disk.store)
    last = max(store.glob("weights/*/*/model.safetensors"))
    content = bytearray(last.read_bytes())
    content[-1] ^= 1
    last.write_bytes(content)
    with pytest.raises(AssertionError):
        audit(Directory(store))
