"""Series, charts and the page: pure functions, checked on their values."""

import json
import math
import re

import pytest

from metaflow_hf import events as ev
from metaflow_hf.report import Outcome, Plan, charts, data_map, page, series, training_page

MARKS = {"line", "point", "rule", "text", "area", "rect"}
PLAN = Plan(base_model="demo/tiny", dataset="demo/docs", tokens=1000)


def specs(value):
    return [block.spec for block in value.blocks if isinstance(block, page.Chart)]


def check(spec):
    """A unit or layered Vega-Lite view: known marks, and every field that is encoded is in the data."""
    json.dumps(spec, allow_nan=False)
    assert spec["$schema"].endswith("v5.json")
    assert spec["width"] == "container"
    assert "url" not in json.dumps({**spec, "$schema": ""})
    for view in spec.get("layer", [spec]):
        assert view["mark"]["type"] in MARKS
        rows = view["data"]["values"]
        assert rows
        for channel in view["encoding"].values():
            for definition in channel if isinstance(channel, list) else [channel]:
                field = definition.get("field") or definition.get("condition", {}).get("field")
                assert field is None or all(field in row for row in rows)


def outcome_of(results):
    measured = {event.name: event for event in results if isinstance(event, ev.Evaluated)}
    return Outcome(
        plan=PLAN,
        **measured,
        xz_bits_per_byte=2.05,
        samples=tuple(event for event in results if isinstance(event, ev.Sampled)),
        model={"type": "model", "key": "models/x.json", "size": 1000},
        tokens=12_345,
        seconds=10,
    )


@pytest.mark.parametrize("workers", [1, 3, 20])
def test_every_chart_of_a_run_holds_its_data(run_events, results, workers):
    events = run_events(workers=workers, rounds=12, claims_per_round=3)
    drawn = specs(training_page(PLAN, events, outcome_of(results)))
    assert len(drawn) == 7  # loss, learning rate, two of rounds, positions, throughput, memory
    for spec in drawn:
        check(spec)


def test_each_worker_has_its_colour_and_more_than_eight_are_one_series(run_events):
    def colours(workers):
        spec = specs(training_page(PLAN, run_events(workers=workers, rounds=2)))[0]
        return spec["layer"][0]["encoding"]["color"]["scale"]

    few, many = colours(8), colours(9)
    assert len(set(few["domain"])) == len(set(few["range"])) == 8
    assert many["domain"] == ["9 workers"]


def test_long_runs_are_bounded_and_keep_the_mean(run_events):
    events = run_events(workers=8, rounds=900, claims_per_round=2)
    labels = series.worker_labels(events)
    points = series.step_points(events, labels)
    assert len(points) <= 8 * (series.MAX_POINTS + 1)
    steps = [event for event in events if isinstance(event, ev.StepDone)]
    assert len(steps) == 28_800
    assert sum(p.loss for p in points) / len(points) == pytest.approx(
        sum(s.loss for s in steps) / len(steps), rel=0.02
    )
    size = len(json.dumps(page.document(training_page(PLAN, events))))
    assert size < 900_000


def test_tokens_of_the_throughput_series_add_up(run_events):
    events = run_events(workers=3, rounds=10)
    points = series.time_points(events, series.worker_labels(events))
    steps = [event for event in events if isinstance(event, ev.StepDone)]
    seconds = max(s.time for s in steps) - min(s.time - s.seconds for s in steps)
    spans = round(seconds / (2 * 60 * min(p.minutes for p in points)))
    total = sum(point.tokens_per_second for point in points) * seconds / spans
    assert total == pytest.approx(sum(step.tokens for step in steps))


def test_the_loss_axis_is_logarithmic_only_for_a_deep_fall():
    def scale(*losses):
        points = [series.StepPoint("w", 100 * i, loss, 1e-3) for i, loss in enumerate(losses)]
        spec = charts.loss_chart(points, ["w"], [], {})
        check(spec)
        return spec["layer"][0]["encoding"]["y"]["scale"].get("type", "linear")

    assert scale(8.3, 2.7) == "linear"
    assert scale(3.0, 0.2) == "log"
    assert scale(3.0, 0.0) == "linear"


def test_what_is_not_finite_never_reaches_a_chart(run_events, results):
    events = run_events(workers=2, rounds=3)
    steps = [i for i, event in enumerate(events) if isinstance(event, ev.StepDone)]
    for i, bad in zip(steps[5:8], (math.nan, math.inf, -math.inf), strict=True):
        events[i] = ev.StepDone(**{**vars(events[i]), "loss": bad, "learning_rate": bad})
    for i, event in enumerate(events):
        if isinstance(event, ev.RoundClosed) and event.round == 1:
            events[i] = ev.RoundClosed(**{**vars(event), "loss": math.nan})
    for spec in specs(training_page(PLAN, events, outcome_of(results))):
        check(spec)


def test_rounds_are_counted_once_however_many_workers_report_them(run_events):
    events = run_events(workers=3, rounds=5, claims_per_round=4)
    rows = series.round_rows(events, series.worker_labels(events))
    assert [row.round for row in rows] == list(range(5))
    assert all(row.contributors == 3 and len(row.tokens_by_worker) == 3 for row in rows)
    assert all(sum(row.tokens_by_worker.values()) == row.tokens for row in rows)
    assert [row.lost_positions for row in rows] == [0, 0, 1, 0, 0]
    waits = [e.waited_seconds for e in events if isinstance(e, ev.RoundClosed) and e.round == 0]
    assert rows[0].waited_seconds == pytest.approx(sum(waits) / 3)


def test_the_page_says_what_was_lost_and_how_long_workers_waited(run_events):
    events = run_events(workers=3, rounds=5, claims_per_round=4)
    blocks = training_page(PLAN, events).blocks
    (tile,) = [
        tile
        for block in blocks
        if isinstance(block, page.Tiles)
        for tile in block.tiles
        if tile.label == "rounds"
    ]
    assert tile.note == "up to 3 workers, 1 claim lost"
    (heading,) = [block for block in blocks if isinstance(block, page.Heading) and block.text == "Rounds"]
    rows = series.round_rows(events, series.worker_labels(events))
    share = 100 * sum(row.waited_seconds for row in rows) / sum(row.seconds for row in rows)
    assert heading.note.endswith(f"waited for each other: {share:.0f} % of the time")


def claim(worker, in_round, position):
    return ev.ClaimDone(time=0, worker=worker, round=in_round, position=position, tokens=1, loss=1.0)


def delta(worker, in_round):
    return ev.DeltaPublished(time=0, worker=worker, round=in_round, positions=1, tokens=1, bytes=1, seconds=1)


def closed(in_round):
    return ev.RoundClosed(
        time=0,
        round=in_round,
        contributors=1,
        tokens=1,
        tokens_total=1,
        positions_done=1,
        positions_total=6,
        loss=1.0,
        seconds=1,
        waited_seconds=0,
        final=False,
    )


def test_a_position_counts_when_its_worker_published_and_the_round_closed():
    events = [
        claim("a", 0, 0),
        delta("a", 0),
        claim("b", 0, 1),  # b was killed before it published
        claim("b", 0, 3),
        closed(0),
        claim("a", 1, 1),
        delta("a", 1),
        closed(1),
        claim("a", 2, 2),
        delta("a", 2),  # the round is still open
    ]
    done = series.position_rounds(events)
    assert done == {0: (0, "a"), 1: (1, "a")}
    grey, coloured = data_map.position_chart(done, set(), 6, {"a": "a"})["layer"]
    assert [cell["position"] for cell in grey["data"]["values"]] == ["2", "3", "4", "5"]
    assert [(cell["position"], cell["round"]) for cell in coloured["data"]["values"]] == [("0", 0), ("1", 1)]
    assert len(data_map.position_chart({}, set(), 6, {})["layer"]) == 1


def test_a_held_out_loss_that_is_not_finite_is_not_called_the_best(run_events):
    trained = [event for event in run_events(workers=1, rounds=2) if not isinstance(event, ev.Evaluated)]

    def note(*losses):
        measured = [
            ev.Evaluated(
                time=1e9,
                worker="a",
                name="held_out",
                loss=loss,
                perplexity=loss,
                bits_per_byte=loss,
                tokens=1,
                bytes=1,
                round=number,
            )
            for number, loss in enumerate(losses, 1)
        ]
        blocks = training_page(PLAN, [*trained, *measured]).blocks
        return next(
            block.note for block in blocks if isinstance(block, page.Heading) and block.text == "Loss"
        )

    assert note(math.nan, 2.0, 3.0).endswith("best 2.000 after round 2")
    assert note(math.nan) == "training loss"


def test_the_page_says_what_its_lines_and_cells_are(run_events):
    def notes(**size):
        blocks = training_page(PLAN, run_events(**size)).blocks
        return {block.text: block.note for block in blocks if isinstance(block, page.Heading)}

    few, many = notes(workers=2, rounds=2), notes(workers=9, rounds=300, claims_per_round=1)
    assert few["Loss"] == "one line a worker; dots are whole rounds"
    assert many["Loss"] == "the mean of 9 workers; diamonds are held-out text, best 2.764 after round 296"
    assert "each cell is a claim of consecutive rows" in few["Data"]
    assert "each cell is 2 neighbouring claims" in many["Data"]


def test_many_positions_are_grouped_and_grey_until_all_of_a_group_is_done():
    done = {position: (position // 1000, "a") for position in range(9_999)}
    grey, coloured = (
        layer["data"]["values"] for layer in data_map.position_chart(done, set(), 10_000, {"a": "a"})["layer"]
    )
    assert [cell["position"] for cell in grey] == ["9995-9999"]
    assert len(coloured) < 2400
    assert coloured[0]["position"] == "0-4"


def test_worker_labels_are_short_unique_and_in_order():
    def labels(*workers):
        return list(series.worker_labels([claim(worker, 0, 0) for worker in workers]).values())

    assert labels("0123456789ab", "fedcba987654") == ["01234567", "fedcba98"]
    assert labels("attempt-a-1", "attempt-a-2") == ["attempt-a-1", "attempt-a-2"]
    assert labels("w1", "w0", "w1") == ["w1", "w0"]
    assert labels("") == ["worker"]
    assert labels("long-prefix", "long-prefix-2") == ["long-prefix", "long-prefix-"]


def test_the_first_blocks_say_the_outcome(run_events, results):
    blocks = training_page(PLAN, run_events(), outcome_of(results)).blocks
    title, tiles, _, table = blocks[:4]
    assert title.text == "Training finished: demo/tiny"
    assert [(tile.label, tile.value) for tile in tiles.tiles[:2]] == [
        ("held-out perplexity", "15.0"),
        ("bits per byte", "1.093"),
    ]
    assert tiles.tiles[0].note == "before 4,105, 273x lower"
    assert tiles.tiles[0].is_good
    assert [row[0] for row in table.rows] == ["before training", "after training", "unigram model", "xz -9"]


def test_a_run_that_got_worse_is_not_painted_green(run_events, results):
    outcome = outcome_of(results)
    worse = Outcome(plan=PLAN, before=outcome.after, after=outcome.before, xz_bits_per_byte=2.0)
    tiles = training_page(PLAN, run_events(), worse).blocks[1].tiles
    assert not any(tile.is_good for tile in tiles)
    assert tiles[0].note.endswith("273x higher")


def test_pages_of_a_run_that_only_began():
    for events in ([], [ev.Notice(time=0, message="begun")]):
        value = training_page(PLAN, events)
        assert specs(value) == []
        assert page.document(value)


def test_no_text_becomes_markup(run_events, hostile):
    events = [
        *run_events(rounds=1),
        ev.Notice(time=0, message=hostile),
        ev.WorkLost(time=0, round=0, positions=1, reason=hostile),
    ]
    outcome = Outcome(
        plan=Plan(base_model=hostile, dataset=hostile, lineage=hostile, notes=(hostile,)),
        samples=(ev.Sampled(time=0, name="after", prompt=hostile, text=hostile),),
        model={"key": hostile, "pathspec": hostile, "size": 1},
    )
    for part in page.document(training_page(outcome.plan, events, outcome))[1:]:
        if isinstance(part, dict):
            continue
        assert "\n" not in part  # a blank line would end the block of HTML
        tags = set(re.findall(r"<(/?[a-z0-9]+)", part))
        assert not tags & {"img", "script", "/pre></div"}
        assert "<img" not in part
        assert "`" not in part
        assert "**" not in part
        assert "](" not in part
        assert part.count("<pre") == part.count("</pre>")
        assert part.count("<div") == part.count("</div>")


def test_escape_keeps_the_text():
    import html

    text = "a|b & <c> \"d\" 'e' `f` *g* [h](i) \\ # ~ é 日本\n\n\tend"
    assert html.unescape(page.escape(text)) == text
    assert page.escape("\x00\x1b\u202e") == "&#65533;" * 3
