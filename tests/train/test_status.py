"""What the store alone says about a lineage: begun, at work, hurt, over."""

import shutil
import signal
import time
from pathlib import Path

import pytest
from soak.trainings import CONFIG, wait_until
from soak.trainings import Training as ProcessTraining

from metaflow_hf.events import StepDone
from metaflow_hf.store import open_store
from metaflow_hf.train.heartbeat import Heartbeat, Patience
from metaflow_hf.train.lineage import Lineage
from metaflow_hf.train.presence import workers_of
from metaflow_hf.train.records import Accepted, ClaimRecord, Round
from metaflow_hf.train.status import closed_rounds, lineage_status, stored_order
from metaflow_hf_cli.training_text import status_lines


def status(store, **settings):
    return lineage_status(Lineage(store), name="test", **{"watch_seconds": 0.0, **settings})


def rounds_on(lineage, *facts):
    """Closes one round after the other by hand."""
    for values in facts:
        base = lineage.newest()
        before = base.manifest
        fields = {
            "nonce": "n",
            "round": base.number + 1,
            "parent": base.digest,
            "weights": before.weights,
            "done": before.done,
            "tokens": before.tokens,
        }
        lineage.create_round(Round(**{**fields, **values}))


def accepted(positions, tokens, loss, attempt="a"):
    return Accepted(attempt=attempt, positions=positions, tokens=tokens, loss=loss, delta_digest="d")


def test_what_was_hardly_begun(training):
    assert status(training.store).state == "starting"
    spec = training.start()
    (training.store.child("rounds")).delete("0000000000.json")
    half = status(training.store)
    assert (half.state, half.positions_total, half.round) == ("starting", spec.num_positions, None)
    training.start()
    begun = status(training.store)
    assert (begun.state, begun.round, begun.positions_left) == ("open", 0, spec.num_positions)
    assert begun.loss is begun.tokens_per_second is begun.eta_seconds is begun.tokens_planned is None
    assert begun.workers == ()


def test_a_training_from_its_first_round_to_its_export(training, tmp_path):
    root = open_store(tmp_path)
    shutil.copytree(training.dataset_dir, tmp_path / "datasets" / "words-0123")
    shutil.copytree(training.dataset_dir, tmp_path / "datasets" / "wordsmith")
    spec = training.start()
    seen = []

    def look(event):
        if isinstance(event, StepDone):
            seen.append(status(training.store, find_order=lambda known: stored_order(root, known)))

    training.work(on_event=look)
    assert all(one.state == "open" for one in seen)
    for one in seen:
        assert one.positions_done + one.positions_claimed + one.positions_left == spec.num_positions
        assert one.positions_claimed == sum(worker.claims for worker in one.workers) >= 1
        # The worker that calls this is in its step, and cannot beat.
        assert [worker.state for worker in one.workers] == ["silent"]
        assert one.chunks_total == 5
    assert [one.positions_done for one in seen] == sorted(one.positions_done for one in seen)

    end = status(training.store, find_order=lambda known: stored_order(root, known))
    assert (end.state, end.positions_done, end.positions_left) == ("final", spec.num_positions, 0)
    assert (end.chunks_done, end.chunks_total) == (5, 5)
    assert (end.workers, end.eta_seconds, end.tokens_planned) == ((), 0.0, end.tokens)
    last = Lineage(training.store).newest().manifest
    assert end.loss == pytest.approx(last.accepted[0].loss)
    assert end.rounds[-1].final
    every = closed_rounds(Lineage(training.store))
    assert [one.round for one in every] == list(range(last.round + 1))
    assert sum(one.tokens for one in every) == last.tokens == every[-1].tokens_total
    assert sum(one.positions for one in every) == spec.num_positions
    assert closed_rounds(Lineage(training.store), after=last.round - 1) == every[-1:]
    training.store.create("exports/abc.json", b'{"key": "models/first"}')
    training.store.create("exports/abc.1.json", b'{"key": "models/second"}')
    assert (status(training.store).state, status(training.store).model) == ("exported", "models/second")


def test_chunks_count_when_all_their_positions_are_in_the_model(training, tmp_path):
    root = open_store(tmp_path)
    shutil.copytree(training.dataset_dir, tmp_path / "datasets" / "words-0123")
    spec = training.start(data={"epochs": 2})
    order = stored_order(root, spec)
    assert order.num_positions == spec.num_positions
    chunk = order.positions_of(1, 0, 1)
    for done, count in (([chunk.start, chunk.stop - 1], 0), ([chunk.start, chunk.stop], 1)):
        lineage = Lineage(training.store)
        rounds_on(lineage, {"done": [tuple(done)]})
        found = status(training.store, find_order=lambda _: order)
        assert (found.chunks_done, found.chunks_total) == (count, 10)


def test_what_was_lost_and_what_fails_again_and_again(training, tmp_path):
    root = open_store(tmp_path)
    shutil.copytree(training.dataset_dir, tmp_path / "datasets" / "words")
    spec = training.start()
    rounds_on(
        Lineage(training.store),
        {
            "accepted": [accepted([(0, 2)], 10, 4.0), accepted([(2, 3)], 30, 2.0)],
            "done": [(0, 3)],
            "tokens": 40,
        },
        {"failures": {3: 1, 4: 2}, "rejected": {"b": "it is not finite"}, "done": [(0, 3)], "tokens": 40},
        {"failures": {4: 3}, "done": [(0, 4)], "skipped": [(4, 5)], "tokens": 50},
    )
    found = status(training.store, find_order=lambda known: stored_order(root, known))
    assert [one.lost for one in found.rounds] == [0, 0, 3, 1]
    assert found.rounds[1].loss == found.loss == 2.5
    assert found.rounds[2].rejected == {"b": "it is not finite"}
    (failing,) = found.failing
    place = stored_order(root, spec).locate(4)
    assert (failing.position, failing.failures, failing.skipped) == (4, 3, True)
    assert (failing.block_id, failing.start, failing.stop) == (place.block_id, place.start, place.stop)
    (unplaced,) = status(training.store).failing
    assert unplaced.block_id is None
    assert (found.positions_skipped, found.positions_left) == (1, spec.num_positions - 5)
    assert found.tokens_planned == round(50 / (5 / spec.num_positions))
    assert [one.lost for one in status(training.store, last_rounds=1).rounds] == [1]


def test_who_is_at_work(training):
    training.start()
    now = [0.0]
    hearts = {
        name: Heartbeat(training.store, name, patience=Patience(), process=None, clock=lambda: now[0])
        for name in ("a", "b", "c")
    }
    for heart in hearts.values():
        heart.begin()
    lineage = Lineage(training.store)
    for position, attempt in enumerate("aadc"):
        lineage.create_claim(0, position, ClaimRecord(attempt=attempt, nonce="n"))

    def one_second(_):
        now[0] += 10
        hearts["a"].progress(step=True)
        hearts["c"].leave()

    newest = lineage.newest()
    found = workers_of(lineage, newest, lineage.claims(0), seconds=3, sleep=one_second)
    facts = {one.attempt: (one.state, one.claims) for one in found}
    assert facts == {"a": ("working", 2), "b": ("silent", 0), "c": ("gone", 1), "d": ("gone", 1)}
    assert now[0] == 30, "b might still move"
    hearts["b"].leave()
    workers_of(lineage, newest, lineage.claims(0), seconds=3, sleep=one_second)
    assert now[0] == 40, "all have moved"


def test_whoever_was_killed_long_ago_is_not_listed_for_ever(training):
    training.start()
    lineage = Lineage(training.store)
    patience = Patience(minimum=0.01, first_step=0.01)
    for name in ("killed", "holder", "alive"):
        # As of another machine: whether these processes live cannot be known.
        Heartbeat(training.store, name, patience=patience, process=None).begin()
        lineage.create_claim(0, len(name), ClaimRecord(attempt=name, nonce="n")) if name == "holder" else None
        time.sleep(0.05)
    found = workers_of(lineage, lineage.newest(), lineage.claims(0), seconds=0)
    assert {one.attempt: one.state for one in found} == {"holder": "gone", "alive": "silent"}


def test_a_killed_worker_is_gone_and_its_claims_are_lost(tmp_path):
    short = {**CONFIG, "rounds": {**CONFIG["rounds"], "max_tokens": 4_000}}
    training = ProcessTraining(root=tmp_path, store=str(tmp_path / "store"), config=short)
    training.prepare()
    try:
        (worker,) = training.start(1)
        worker.await_claims(2)
        worker.send(signal.SIGSTOP)
        store = open_store(training.store)
        # Stopped between two claims or two rounds it holds nothing that could be lost.
        wait_until(lambda: _holds_a_claim(store, worker), "no claim is in hand")
        assert [one.state for one in status(store).workers] == ["silent"]
        worker.send(signal.SIGKILL)
        worker.end()
        held = status(store)
        assert [one.state for one in held.workers] == ["gone"]
        (other,) = training.start(1)
        assert other.end() == 0
    finally:
        training.kill_all()
    found = status(store, last_rounds=1000)
    assert found.state == "final"
    assert sum(one.lost for one in found.rounds) == held.positions_claimed > 0


def _holds_a_claim(store, worker):
    # Only when it stands is what it has published all there will be.
    wait_until(lambda: _is_stopped(worker.process.pid), "it does not stop")
    found = status(store)
    if found.positions_claimed and not any(one.published for one in found.workers):
        return True
    worker.send(signal.SIGCONT)
    worker.send(signal.SIGSTOP)
    return False


def _is_stopped(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_two_processes_stop_early_at_the_same_round(tmp_path):
    """No measurement is ever better by enough: as soon as there are two, the run is over for both."""
    rules = {"every_rounds": 6, "max_samples": 1, "early_stop": {"patience": 1, "min_improvement": 100.0}}
    config = {
        "data": {**CONFIG["data"], "epochs": 20},
        "rounds": {**CONFIG["rounds"], "workers": 2, "seconds": 0.01},
        "evaluation": rules,
    }
    training = ProcessTraining(root=tmp_path, store=str(tmp_path / "store"), config=config)
    training.prepare()
    try:
        assert [worker.end() for worker in training.start(2)] == [0, 0]
    finally:
        training.kill_all()
    store = open_store(training.store)
    lineage, found = Lineage(store), status(store, last_rounds=1000)
    assert (found.state, [one.final for one in found.rounds]) == ("final", [False] * found.round + [True])
    assert "was not improved in 1 measurements (evaluation.early_stop)" in found.stopped
    assert len(lineage.validations()) >= 2
    assert found.positions_done < found.positions_total
    assert any(line.strip().startswith("stopped") for line in status_lines(found))
