import json
import os
import signal
import subprocess
import sys
import time

import pytest

from metaflow_hf import errors
from metaflow_hf import events as ev
from metaflow_hf.report import MetricsFile, fan_out, merge_events, parse_events, read_events


def test_events_come_back_as_they_went(tmp_path, run_events, results, hostile):
    path = tmp_path / "deep" / "metrics.jsonl"
    events = [
        *run_events(workers=2, rounds=3),
        *results,
        ev.Notice(time=1.5, message=hostile, details={"a": [1, None]}),
    ]
    with MetricsFile(path) as metrics:
        for event in events:
            metrics(event)
        assert metrics.events() == events
    assert read_events(path) == events
    assert parse_events(path.read_text()) == events
    assert all(json.loads(line)["event"] for line in path.read_text().splitlines())


@pytest.mark.parametrize("torn", [b'{"event":"Notice","time":3.0,"wor', b"x" * 200_000])
def test_a_torn_last_line_is_ignored_and_cut_by_the_next_writer(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    first, second = ev.Notice(time=1, message="one"), ev.Notice(time=2, message="two")
    with MetricsFile(path) as metrics:
        metrics(first)
    with path.open("ab") as file:
        file.write(torn)
    assert read_events(path) == [first]
    with MetricsFile(path) as metrics:
        metrics(second)
    assert read_events(path) == [first, second]


def test_a_file_that_is_only_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"event":')
    with MetricsFile(path) as metrics:
        assert metrics.events() == []


def test_damage_in_the_middle_names_the_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as metrics:
        metrics(ev.Notice(time=1, message="one"))
    path.write_bytes(path.read_bytes() + b"{]\n" + path.read_bytes())
    with pytest.raises(errors.IntegrityError, match="line 2 of .*metrics.jsonl"):
        read_events(path)


@pytest.mark.parametrize(
    "line", ['{"event":"FromTheFuture","time":1}', '{"event":"Notice","time":1,"new":2}', "[]"]
)
def test_what_a_newer_version_wrote_is_said(tmp_path, line):
    with pytest.raises(errors.IntegrityError, match="newer version"):
        parse_events(line + "\n")


def test_a_missing_file_is_not_an_empty_one(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_events(tmp_path / "none.jsonl")


def test_numbers_that_json_lacks(tmp_path):
    with MetricsFile(tmp_path / "m.jsonl") as metrics:
        metrics(
            ev.Evaluated(
                time=1,
                name="x",
                loss=float("nan"),
                perplexity=float("inf"),
                bits_per_byte=1,
                tokens=1,
                bytes=1,
            )
        )
        (event,) = metrics.events()
    assert event.loss != event.loss
    assert event.perplexity == float("inf")


def test_killed_writer_loses_at_most_the_line_in_hand(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = (
        "import sys, itertools\n"
        "from metaflow_hf.report import MetricsFile\nfrom metaflow_hf.events import Notice\n"
        "metrics = MetricsFile(sys.argv[1])\n"
        "for number in itertools.count():\n"
        "    metrics(Notice(time=number, message='x' * 500))\n"
        "    print(number, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", writer, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        while int(process.stdout.readline()) < 200:
            pass
        time.sleep(0.01)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        last_said = [int(line) for line in process.stdout.read().splitlines() if line][-1]
        process.stdout.close()
        process.wait()
    events = read_events(path)
    assert [event.time for event in events] == list(range(len(events)))
    assert len(events) >= last_said


def test_merge_is_in_time_order_and_keeps_each_workers_order():
    def notes(worker, *times):
        return [ev.Notice(time=t, worker=worker, message=f"{worker}{i}") for i, t in enumerate(times)]

    a = notes("a", 1.0, 5.0, 2.0, 6.0)  # its clock was set back once
    b = notes("b", 1.0, 3.0, 5.5)
    assert [event.message for event in merge_events(a, b)] == ["a0", "b0", "b1", "a1", "a2", "b2", "a3"]
    assert merge_events() == []


def test_fan_out_calls_all_in_order_and_does_not_hide_errors():
    heard = []

    def fail(event):
        raise RuntimeError("listener")

    event = ev.Notice(time=0, message="")
    fan_out(lambda e: heard.append(("first", e)), lambda e: heard.append(("second", e)))(event)
    assert heard == [("first", event), ("second", event)]
    with pytest.raises(RuntimeError):
        fan_out(fail, heard.append)(event)
