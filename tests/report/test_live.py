"""The page while a run goes on: how often it is drawn, what it shows, and that it stays small."""

import html
import math

from metaflow_hf.errors import StoreUnavailable
from metaflow_hf.events import ClaimDone, RoundClosed, StepDone
from metaflow_hf.report import LivePage, Plan, live
from metaflow_hf.report.live import joined_steps
from metaflow_hf.report.page import Progress

PLAN = Plan(base_model="demo/tiny", dataset="demo/docs", tokens=1_000_000)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def drawn_pages(run, *, others=lambda _: (), seconds=0.1, interval=5.0):
    clock, pages = Clock(), []
    page = LivePage(pages.append, PLAN, others=others, interval_seconds=interval, clock=clock)
    for event in run:
        page(event)
        clock.now += seconds
    return page, pages


def text_of(page):
    from metaflow_hf.report.page import Chart, fragment

    return html.unescape(" ".join(fragment(block) for block in page.blocks if not isinstance(block, Chart)))


def test_it_is_drawn_at_once_and_then_after_each_interval(run_events):
    run = run_events(workers=1, rounds=10)
    page, pages = drawn_pages(run, seconds=0.5, interval=20.0)
    assert 2 <= len(pages) <= 1 + len(run) * 0.5 / 20.0
    page.close()
    assert "Training: demo/tiny" in text_of(pages[-1])


def test_how_far_it_is_and_how_long_it_will_take(run_events):
    run = run_events(workers=2, rounds=40)
    half = [event for event in run if getattr(event, "round", 0) < 20]
    page, pages = drawn_pages(half)
    page.close()
    [bar] = [block for block in pages[-1].blocks if isinstance(block, Progress)]
    assert bar.fraction == 0.5
    closed = [event for event in half if isinstance(event, RoundClosed)]
    seconds = (closed[-1].time - closed[0].time) / 19 * 20
    assert f"50 % of the tokens, about {seconds:.0f} s left" in bar.note


def test_claims_of_an_open_round_wait_in_orange(run_events):
    run = run_events(workers=1, rounds=4, claims_per_round=3, positions_left=2)
    closed = [event for event in run if isinstance(event, RoundClosed)]
    open_round = [event for event in run if not (isinstance(event, RoundClosed) and event is closed[-1])]
    _, pages = drawn_pages([*open_round, open_round[-1]])
    page = live.training_page(PLAN, open_round)
    said = text_of(page)
    assert "9 of 14 positions are in the model, 3 wait for their round to close (orange), 2 are left" in said
    assert pages


def test_the_page_shows_the_others_and_goes_on_without_them(run_events, caplog):
    run = run_events(workers=2, rounds=4)
    workers = sorted({event.worker for event in run if isinstance(event, StepDone)})
    own, other = ([event for event in run if event.worker == worker] for worker in workers)
    asked = []

    def others(attempt):
        asked.append(attempt)
        if len(asked) > 1:
            raise StoreUnavailable("the bucket is away")
        return [other]

    page, pages = drawn_pages(own, others=others, interval=1_000.0)
    assert asked == [workers[0]]
    assert workers[1][:8] in str(pages[0])
    page.close()
    assert workers[1][:8] not in str(pages[1])
    assert "the bucket is away" in caplog.text


def test_joined_steps_have_the_same_tokens_seconds_and_mean_loss(run_events):
    run = run_events(workers=3, rounds=3)
    joined = joined_steps(run)

    def sums(events):
        steps = [event for event in events if isinstance(event, StepDone)]
        tokens = sum(step.tokens for step in steps)
        return len(steps), tokens, sum(s.seconds for s in steps), sum(s.loss * s.tokens for s in steps)

    (count, *before), (fewer, *after) = sums(run), sums(joined)
    assert fewer == count / 2
    assert all(math.isclose(left, right) for left, right in zip(before, after, strict=True))
    assert [e for e in joined if isinstance(e, ClaimDone)] == [e for e in run if isinstance(e, ClaimDone)]


def test_a_long_run_does_not_fill_the_memory(run_events, monkeypatch):
    monkeypatch.setattr(live, "MAX_STEPS", 100)
    run = run_events(workers=1, rounds=60)
    page, _ = drawn_pages(run, interval=1_000.0)
    assert sum(isinstance(event, StepDone) for event in run) > 900
    assert sum(isinstance(event, StepDone) for event in page._events) <= 101
