"""The page of a training run: the outcome in the first screen, then the curves, the rounds, the data, the model.

A pure function of the plan, the events so far and, at the end, the outcome; while training runs it is drawn
again and again from the events that there are.
"""

from collections.abc import Sequence

from metaflow_hf.events import Event, Notice, StepDone, WorkLost
from metaflow_hf.report import charts, series, text, units
from metaflow_hf.report.outcome import Outcome, Plan, load_snippet, sample_pairs
from metaflow_hf.report.page import Block, Chart, Code, Comparison, Grid, Heading, Page, Tile, Tiles, Title
from metaflow_hf.report.series import RoundRow

_MAX_ROUND_ROWS = 500
_MAX_NOTICES = 50


def training_page(plan: Plan, events: Sequence[Event], outcome: Outcome | None = None) -> Page:
    """The page of a run; ``events`` of all workers in the order of time, ``outcome`` once it is over.

    Parts without data are left out. Size: bounded whatever the length of the run.
    """
    labels = series.worker_labels(events)
    rounds = series.round_rows(events, labels)
    blocks: list[Block] = [_title(plan, outcome), _tiles(plan, events, rounds, outcome)]
    if outcome is not None:
        blocks += _evaluation(outcome)
    blocks += _curves(events, labels, rounds, outcome)
    if outcome is not None:
        blocks += _samples(outcome) + _model(outcome)
    blocks += _rounds(rounds, _names(labels))
    blocks += _positions(events, labels, rounds)
    blocks += _machine(events, labels)
    blocks += _plan(plan) + _messages(events)
    return Page(tuple(blocks))


def _title(plan: Plan, outcome: Outcome | None) -> Title:
    state = "Training finished" if outcome is not None else "Training"
    return Title(
        f"{state}: {plan.base_model}",
        (
            f"model {text.named_revision(plan.base_model, plan.model_commit)}",
            f"data {text.named_revision(plan.dataset, plan.dataset_commit)}",
        ),
    )


def _tiles(plan: Plan, events: Sequence[Event], rounds: Sequence[RoundRow], outcome: Outcome | None) -> Tiles:
    steps = [event for event in events if isinstance(event, StepDone)]
    tiles: list[Tile] = []
    if outcome is not None and outcome.after is not None:
        after, before = outcome.after, outcome.before
        tiles.append(
            Tile(
                "held-out perplexity",
                units.perplexity(after.perplexity),
                f"before {units.perplexity(before.perplexity)}, "
                f"{units.ratio(before.perplexity, after.perplexity)}"
                if before is not None
                else "",
                is_good=before is not None and after.perplexity < before.perplexity,
            )
        )
        xz = outcome.xz_bits_per_byte
        tiles.append(
            Tile(
                "bits per byte",
                f"{after.bits_per_byte:.3f}",
                f"xz -9 needs {xz:.3f}" if xz is not None else "",
                is_good=xz is not None and after.bits_per_byte < xz,
            )
        )
    elif steps:
        tiles.append(Tile("training loss", units.loss(steps[-1].loss), "nats per token, last step"))
    done = max([outcome.tokens if outcome else 0, *(r.tokens_total for r in rounds)], default=0)
    done = done or max((step.tokens_total for step in steps), default=0)
    planned = steps[-1].tokens_planned if steps else plan.tokens
    tiles.append(
        Tile(
            "tokens trained",
            units.short_count(done),
            f"{units.percent(done, planned)} of {units.short_count(planned)}" if planned else "",
        )
    )
    if steps:
        seconds = (outcome.seconds if outcome else 0.0) or (
            max(step.time for step in steps) - min(step.time - step.seconds for step in steps)
        )
        rate = f"{units.short_count(done / seconds)} tokens/s" if seconds > 0 else ""
        tiles.append(Tile("time", units.duration(seconds), rate))
        attempts = len({step.worker for step in steps})
        widest = max((row.contributors for row in rounds), default=attempts)
        notes = [f"up to {_workers(widest)}"]
        notes += [f"{attempts} starts"] if attempts > widest else []
        lost = sum(row.lost_positions for row in rounds)
        notes += [f"{units.count(lost)} claims lost" if lost > 1 else "1 claim lost"] if lost else []
        tiles.append(Tile("rounds", units.count(len(rounds)), ", ".join(notes)))
    return Tiles(tuple(tiles))


def _names(labels: dict[str, str]) -> list[str]:
    return list(dict.fromkeys(labels.values()))


def _drawn(*specs: charts.Spec | None) -> list[Block]:
    return [Chart(spec) for spec in specs if spec is not None]


def _workers(number: int) -> str:
    return "1 worker" if number == 1 else f"{number} workers"


def _evaluation(outcome: Outcome) -> list[Block]:
    rows = text.evaluation_rows(outcome)
    if not rows:
        return []
    strong = frozenset(number for number, row in enumerate(rows) if row[0] == "after training")
    size = text.heldout_size(outcome)
    return [
        Heading("Held-out text", f"{size} that no worker trained on; lower is better" if size else ""),
        Grid(text.EVALUATION_HEADERS, tuple(rows), numeric=frozenset({1, 2, 3}), strong_rows=strong),
    ]


def _curves(
    events: Sequence[Event], labels: dict[str, str], rounds: Sequence[RoundRow], outcome: Outcome | None
) -> list[Block]:
    points, workers = series.step_points(events, labels), _names(labels)
    references = {}
    if outcome is not None and outcome.unigram is not None:
        references["unigram model, held-out text"] = outcome.unigram.loss
    if outcome is not None and outcome.after is not None:
        references["this model, held-out text"] = outcome.after.loss
    note = "training loss"
    if len(workers) > 1:
        note = "one line a worker; dots are whole rounds" if rounds else "one line a worker"
    elif len(labels) > 1:
        note = f"the mean of {workers[0]}"
    drawn = _drawn(
        charts.loss_chart(points, workers, rounds, references), charts.learning_rate_chart(points, workers)
    )
    return [Heading("Loss", note), *drawn] if drawn else []


def _samples(outcome: Outcome) -> list[Block]:
    pairs = sample_pairs(outcome.samples)
    if not pairs:
        return []
    return [
        Heading("Samples", "the same prompts and the same seed, before and after training"),
        *(Comparison(prompt, before, after) for prompt, before, after in pairs),
    ]


def _model(outcome: Outcome) -> list[Block]:
    if outcome.model is None:
        return []
    order = ("key", "label", "digest", "size", "num_files", "created_on", "pathspec")
    rows = [
        (name, units.byte_size(outcome.model[name]) if name == "size" else str(outcome.model[name]))
        for name in order
        if outcome.model.get(name)
    ]
    return [
        Heading("Model", "load it, wherever this datastore is configured, by"),
        Code(load_snippet(outcome)),
        Grid(("", ""), tuple(rows)),
    ]


def _rounds(rounds: Sequence[RoundRow], workers: Sequence[str]) -> list[Block]:
    if not rounds:
        return []
    shown = rounds[-_MAX_ROUND_ROWS:]
    rows = tuple(
        (
            str(row.round),
            str(row.contributors),
            f"{units.count(row.positions_done)}/{units.count(row.positions_total)}",
            units.count(row.tokens),
            units.loss(row.loss),
            units.duration(row.seconds),
            units.duration(row.waited_seconds),
            str(row.lost_positions or ""),
        )
        for row in shown
    )
    headers = ("round", "workers", "positions", "tokens", "loss", "time", "waited", "positions lost")
    folded = f"all {len(rows)} rounds" if len(shown) == len(rounds) else f"the last {len(rows)} rounds"
    seconds = sum(row.seconds for row in rounds)
    waited = units.percent(sum(row.waited_seconds for row in rounds), seconds) if seconds > 0 else ""
    note = "what each worker contributed, and how long the workers waited for each other"
    return [
        Heading("Rounds", f"{note}: {waited} of the time" if waited else note),
        *_drawn(charts.round_tokens_chart(rounds, workers), charts.round_seconds_chart(rounds)),
        Grid(headers, rows, numeric=frozenset(range(8)), folded=folded),
    ]


def _positions(events: Sequence[Event], labels: dict[str, str], rounds: Sequence[RoundRow]) -> list[Block]:
    total = max((row.positions_total for row in rounds), default=0)
    done = series.position_rounds(events)
    spec = charts.position_chart(done, total, labels) if done else None
    if spec is None:
        return []
    in_model = max(row.positions_done for row in rounds)
    size = charts.positions_per_cell(total)
    cell = "a claim of consecutive rows" if size == 1 else f"{size} neighbouring claims"
    note = (
        f"{units.count(in_model)} of {units.count(total)} positions are in the model; each cell is {cell}, in the "
        "order of training; grey is left"
    )
    return [Heading("Data", note), Chart(spec)]


def _machine(events: Sequence[Event], labels: dict[str, str]) -> list[Block]:
    points, workers = series.time_points(events, labels), _names(labels)
    drawn = _drawn(charts.throughput_chart(points, workers), charts.memory_chart(points, workers))
    note = "tokens per second of all workers, waiting included"
    return [Heading("Throughput and memory", note), *drawn] if drawn else []


def _plan(plan: Plan) -> list[Block]:
    rows = tuple((label, value) for label, value in text.plan_rows(plan) if value)
    return [Heading("Plan", "as estimated before the first step"), Grid(("", ""), rows)]


def _messages(events: Sequence[Event]) -> list[Block]:
    lost = [event for event in events if isinstance(event, WorkLost)]
    notices = [event for event in events if isinstance(event, Notice)]
    rows = [
        ("lost work", f"round {event.round}: {units.count(event.positions)} positions, {event.reason}")
        for event in lost[-_MAX_NOTICES:]
    ]
    rows += [("notice", event.message) for event in notices[-_MAX_NOTICES:]]
    return [Heading("Messages"), Grid(("", ""), tuple(rows))] if rows else []
