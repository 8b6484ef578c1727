import threading

import pytest

from metaflow_hf import events as ev
from metaflow_hf.report import ProgressLines, units


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def step(number, *, tokens_total, loss=3.21, tokens=1000, seconds=1.0, planned=100_000, in_round=0):
    return ev.StepDone(
        time=0,
        worker="w",
        round=in_round,
        step=number,
        loss=loss,
        learning_rate=2e-4,
        tokens=tokens,
        seconds=seconds,
        tokens_total=tokens_total,
        tokens_planned=planned,
    )


def closed(number, *, tokens_total, contributors=2, waited=0.2, loss=3.1, final=False):
    return ev.RoundClosed(
        time=0,
        round=number,
        contributors=contributors,
        tokens=1000,
        tokens_total=tokens_total,
        positions_done=640,
        positions_total=1600,
        loss=loss,
        seconds=5.0,
        waited_seconds=waited,
        final=final,
    )


def test_one_line_per_interval_with_the_figures_since_the_last(clock):
    lines = []
    on_event = ProgressLines(lines.append, interval_seconds=10, planned_steps=4800, clock=clock)
    for number in range(1, 26):
        clock.now += 1
        on_event(step(number, tokens=38_000, tokens_total=number * 38_000, planned=38_000 * 745))
    assert lines == [
        "round 0 step 1/4800 loss 3.21 lr 2.0e-4 38k tok/s eta 12 min",
        "round 0 step 11/4800 loss 3.21 lr 2.0e-4 38k tok/s eta 12 min",
        "round 0 step 21/4800 loss 3.21 lr 2.0e-4 38k tok/s eta 12 min",
    ]


def test_label_and_share_without_a_known_number_of_steps(clock):
    lines = []
    clock.now += 1
    ProgressLines(lines.append, label="w2", clock=clock)(step(7, tokens_total=26_000))
    assert lines[0].startswith("[w2] round 0 step 7 (26%) loss 3.21 ")


def test_loss_is_smoothed_over_tokens(clock):
    lines = []
    on_event = ProgressLines(lines.append, interval_seconds=0, clock=clock)
    clock.now += 1
    on_event(step(1, tokens_total=1000, loss=4.0))
    clock.now += 1
    on_event(step(2, tokens_total=2000, loss=2.0))
    # (0.9 * 4 + 2) / (0.9 + 1)
    assert "loss 4.00 " in lines[0]
    assert "loss 2.95 " in lines[1]


def test_eta_counts_the_other_workers_through_the_rounds(clock):
    """Two workers commit 4,000 tokens per 2 s; this one alone does 1,000 a second."""
    lines = []
    on_event = ProgressLines(lines.append, interval_seconds=0, clock=clock)
    committed = 0
    for number in range(5):
        for own in (1000, 2000):
            clock.now += 1
            on_event(step(number, in_round=number, tokens_total=committed + own))
        committed += 4000
        on_event(closed(number, tokens_total=committed))
    clock.now += 1
    lines.clear()
    on_event(step(11, in_round=5, tokens_total=committed + 1000))
    # 80,000 left when the last round closed, at 2,000 a second, 1 s ago.
    assert lines[0].endswith("eta 39 s")


def test_a_round_that_takes_longer_than_all_before_is_not_the_end(clock):
    lines = []
    on_event = ProgressLines(lines.append, interval_seconds=0, clock=clock)
    for number in range(4):
        clock.now += 1
        on_event(step(number, in_round=number, tokens_total=20_000 * (number + 1)))
        on_event(closed(number, tokens_total=20_000 * (number + 1)))
    clock.now += 100
    on_event(step(5, in_round=4, tokens_total=81_000))
    # Two workers: 2,000 of the last 20,000, at 20,000 a second.
    assert lines[-1].endswith("eta 0.9 s")


def test_eta_before_any_round_multiplies_by_the_planned_workers(clock):
    lines = []
    on_event = ProgressLines(lines.append, planned_workers=3, clock=clock)
    clock.now += 1
    on_event(step(1, tokens_total=1000))
    assert lines[0].endswith("eta 33 s")


def test_eta_goes_on_after_a_restart_from_what_was_done_here(clock):
    """90,000 tokens came from before this process: they say nothing about its pace."""
    lines = []
    on_event = ProgressLines(lines.append, clock=clock)
    clock.now += 1
    on_event(step(901, tokens_total=91_000))
    assert lines[0].endswith("eta 9.0 s")


def test_eta_survives_a_clock_that_stands_still_and_a_run_past_its_plan(clock):
    lines = []
    on_event = ProgressLines(lines.append, interval_seconds=0, clock=clock)
    on_event(step(1, tokens_total=1000, seconds=0.0))
    on_event(step(2, tokens_total=100_500))
    assert lines[0].endswith("0 tok/s eta unknown")
    assert lines[1].endswith("eta 0.0 s")


def test_round_lines_every_interval_and_the_final_one_always(clock):
    lines = []
    on_event = ProgressLines(lines.append, interval_seconds=10, clock=clock)
    for number in range(12, 16):
        on_event(closed(number, tokens_total=number * 1000))
        clock.now += 3
    on_event(closed(16, tokens_total=16_000))
    on_event(closed(17, tokens_total=17_000, contributors=1, loss=None, waited=0.0, final=True))
    assert lines == [
        "round 12: 2 workers, 640/1,600 positions, loss 3.10, waited 0.2 s",
        "round 16: 2 workers, 640/1,600 positions, loss 3.10, waited 0.8 s",  # of four rounds
        "round 17: 1 worker, 640/1,600 positions, loss -, waited 0.0 s, the last one",
    ]


def test_lost_work_and_notices_are_always_written_on_one_harmless_line(clock, hostile):
    lines = []
    on_event = ProgressLines(lines.append, label="a", clock=clock)
    on_event(ev.WorkLost(time=0, round=3, positions=1, reason="the round closed first; others train it"))
    on_event(ev.WorkLost(time=0, round=3, positions=1200, reason="delta rejected"))
    on_event(ev.Notice(time=0, message=hostile))
    assert lines[:2] == [
        "[a] round 3: lost 1 position: the round closed first; others train it",
        "[a] round 3: lost 1,200 positions: delta rejected",
    ]
    assert "\n" not in lines[2]
    assert "\x1b" not in lines[2]
    assert "\\x1b[31m" in lines[2]
    assert "日本" in lines[2]


def test_downloads_blocks_and_evaluations(clock):
    lines = []
    on_event = ProgressLines(lines.append, interval_seconds=10, clock=clock)
    for done in (0, 25 * 2**20, 50 * 2**20, 100 * 2**20):
        on_event(ev.DownloadProgress(time=0, name="gpt2", done_bytes=done, total_bytes=100 * 2**20))
        clock.now += 4
    on_event(ev.DownloadProgress(time=0, name="other", done_bytes=5, total_bytes=0))
    on_event(
        ev.BlockCommitted(time=0, dataset="d", block_id=11, total_samples=1_200_000, total_bytes=870 * 2**20)
    )
    on_event(
        ev.Evaluated(
            time=0, name="before", loss=8.0, perplexity=2981, bits_per_byte=3.2, tokens=1234, bytes=9
        )
    )
    assert lines == [
        "download gpt2: 0 B/100 MiB",
        "download gpt2: 100 MiB/100 MiB, 8.3 MiB/s",
        "download other: 5 B",
        "blocks of d: 12 written, 1,200,000 samples, 870 MiB",
        "evaluation before: loss 8.00, perplexity 2,981, 3.200 bits per byte (1,234 tokens)",
    ]


def test_events_of_a_whole_run_never_break_a_line(run_events, clock):
    lines = []
    on_event = ProgressLines(lines.append, interval_seconds=1, clock=clock)
    start = clock.now
    for event in run_events(workers=2, rounds=10):
        clock.now = start + event.time - 1_700_000_000
        on_event(event)
    assert len(lines) > 10
    assert not any("nan" in line or "unknown" in line for line in lines)


def test_threads_write_whole_lines_and_count_every_step(clock):
    lines = []
    on_event = ProgressLines(lines.append, interval_seconds=1e9, clock=clock)

    def work():
        for number in range(500):
            on_event(step(number, tokens_total=number))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(lines) == 1


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (units.short_count, 0, "0"),
        (units.short_count, 7, "7"),
        (units.short_count, 2.5, "2.5"),
        (units.short_count, 999, "999"),
        (units.short_count, 999.6, "1k"),
        (units.short_count, 38_123, "38k"),
        (units.short_count, 1_250_000, "1.2M"),
        (units.short_count, 999_960, "1M"),
        (units.short_count, 5e20, "500000P"),
        (units.short_count, float("inf"), "inf"),
        (units.byte_size, 0, "0 B"),
        (units.byte_size, 1023, "1023 B"),
        (units.byte_size, 1536, "1.5 KiB"),
        (units.byte_size, 1.3 * 2**30, "1.3 GiB"),
        (units.byte_size, 2**20 - 1, "1 MiB"),
        (units.duration, 0.04, "0.0 s"),
        (units.duration, 9.96, "10 s"),
        (units.duration, 89.4, "89 s"),
        (units.duration, 720, "12 min"),
        (units.duration, 3 * 3600 + 1440, "3.4 h"),
        (units.duration, 2.5 * 86400, "2.5 days"),
        (units.duration, float("nan"), "nan"),
        (units.perplexity, 24.81, "24.8"),
        (units.perplexity, 3018.4, "3,018"),
        (units.perplexity, 1.5, "1.50"),
        (units.perplexity, float("inf"), "inf"),
        (units.learning_rate, 2e-4, "2.0e-4"),
        (units.learning_rate, 0.0, "0.0e0"),
        (units.learning_rate, float("nan"), "nan"),
    ],
)
def test_units(function, value, text):
    assert function(value) == text


def test_ratio():
    assert units.ratio(100, 10) == "10x lower"
    assert units.ratio(10, 14) == "1.4x higher"
    assert units.ratio(3, 3) == "unchanged"
    assert units.ratio(float("inf"), 3) == ""
