"""The sections of a run's page: each a pure function from values to blocks, empty where there is nothing to show."""

from collections.abc import Mapping, Sequence

from metaflow_hf.events import Event, Notice, Sampled, WorkLost
from metaflow_hf.report import charts, data_map, mixture_tables, series, text, units
from metaflow_hf.report.outcome import Outcome, Plan, load_snippet, sample_pairs
from metaflow_hf.report.page import Block, Chart, Code, Comparison, Grid, Heading
from metaflow_hf.report.series import RoundRow

_MAX_ROUND_ROWS = 500
_MAX_NOTICES = 50
_MAX_SAMPLES = 40


def names(labels: dict[str, str]) -> list[str]:
    return list(dict.fromkeys(labels.values()))


def _drawn(*specs: charts.Spec | None) -> list[Block]:
    return [Chart(spec) for spec in specs if spec is not None]


def evaluation(outcome: Outcome) -> list[Block]:
    rows = text.evaluation_rows(outcome)
    if not rows:
        return []
    strong = frozenset(number for number, row in enumerate(rows) if row[0] == "after training")
    size = text.heldout_size(outcome)
    return [
        Heading("Held-out text", f"{size} that no worker trained on; lower is better" if size else ""),
        Grid(text.EVALUATION_HEADERS, tuple(rows), numeric=frozenset({1, 2, 3}), strong_rows=strong),
        *_datasets(outcome),
    ]


def _datasets(outcome: Outcome) -> list[Block]:
    """What was trained of each dataset of a mixture, and the losses of its held-out rows."""
    rows = mixture_tables.result_rows(outcome)
    if not rows:
        return []
    return [
        Heading("Datasets", "what was trained of each, and the loss of its held-out rows in nats per token"),
        Grid(mixture_tables.RESULT_HEADERS, tuple(rows), numeric=frozenset(range(1, 6))),
    ]


def tasks(outcome: Outcome) -> list[Block]:
    """What lm-evaluation-harness says before and after training."""
    if not outcome.tasks:
        return []
    return [
        Heading("Tasks", "lm-evaluation-harness, the same examples before and after training"),
        Grid(text.TASK_HEADERS, tuple(text.task_rows(outcome)), numeric=frozenset({2, 3})),
    ]


def curves(
    events: Sequence[Event], labels: dict[str, str], rounds: Sequence[RoundRow], outcome: Outcome | None
) -> list[Block]:
    points, workers = series.step_points(events, labels), names(labels)
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
    measured = series.measured_rounds(events)
    best = series.best_measured(measured)
    if best is not None:
        note += f"; diamonds are held-out text, best {best.loss:.3f} after round {best.round}"
    drawn = _drawn(
        charts.loss_chart(points, workers, rounds, references, measured),
        charts.learning_rate_chart(points, workers),
    )
    return [Heading("Loss", note), *drawn] if drawn else []


def samples(events: Sequence[Event], outcome: Outcome | None) -> list[Block]:
    """What models wrote: before and after training side by side, and what the rounds wrote that were sampled."""
    pairs = sample_pairs(outcome.samples) if outcome is not None else []
    meanwhile = _sampled_rounds([event for event in events if isinstance(event, Sampled) and event.round])
    if not pairs and not meanwhile:
        return []
    note = (
        "the same prompts and the same seed, before and after training"
        if pairs
        else "the same prompts each time"
    )
    shown = [Comparison(prompt, before, after) for prompt, before, after in pairs]
    return [Heading("Samples", note), *shown, *meanwhile]


def _sampled_rounds(found: Sequence[Sampled]) -> list[Block]:
    if not found:
        return []
    rows = tuple((str(event.round), event.prompt, event.text) for event in found[-_MAX_SAMPLES:])
    return [Grid(("round", "prompt", "text"), rows, numeric=frozenset({0}), folded="samples of the rounds")]


def worst_rows(outcome: Outcome) -> list[Block]:
    """The held-out rows that the trained model predicts worst."""
    rows = tuple(
        (
            row.place,
            row.text,
            str(row.tokens),
            "" if row.loss_before is None else f"{row.loss_before:.2f}",
            f"{row.loss:.2f}",
        )
        for row in outcome.worst
    )
    if not rows:
        return []
    return [
        Heading(
            "Worst held-out rows",
            "what the trained model predicts worst: noise in the data, or something to learn",
        ),
        Grid(("row", "text", "tokens", "before", "after"), rows, numeric=frozenset({2, 3, 4})),
    ]


def model(outcome: Outcome) -> list[Block]:
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


def rounds(rounds: Sequence[RoundRow], workers: Sequence[str]) -> list[Block]:
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


def positions(events: Sequence[Event], labels: Mapping[str, str], rounds: Sequence[RoundRow]) -> list[Block]:
    total = max((row.positions_total for row in rounds), default=0)
    done, claimed = series.position_rounds(events), series.claimed_positions(events)
    spec = data_map.position_chart(done, claimed, total, labels) if done or claimed else None
    if spec is None:
        return []
    in_model = max(row.positions_done for row in rounds)
    size = data_map.positions_per_cell(total)
    cell = "a claim of consecutive rows" if size == 1 else f"{size} neighbouring claims"
    waiting = f"{units.count(len(claimed))} wait for their round to close (orange), " if claimed else ""
    note = (
        f"{units.count(in_model)} of {units.count(total)} positions are in the model, {waiting}"
        f"{units.count(max(total - in_model - len(claimed), 0))} are left (grey); each cell is {cell}, in the order of "
        "training"
    )
    return [Heading("Data", note), Chart(spec)]


def machine(events: Sequence[Event], labels: dict[str, str]) -> list[Block]:
    points, workers = series.time_points(events, labels), names(labels)
    drawn = _drawn(charts.throughput_chart(points, workers), charts.memory_chart(points, workers))
    note = "tokens per second of all workers, waiting included"
    return [Heading("Throughput and memory", note), *drawn] if drawn else []


def plan(plan: Plan) -> list[Block]:
    rows = tuple((label, value) for label, value in text.plan_rows(plan) if value)
    blocks: list[Block] = [Heading("Plan", "as estimated before the first step"), Grid(("", ""), rows)]
    if datasets := mixture_tables.plan_rows(plan):
        blocks.append(Grid(mixture_tables.PLAN_HEADERS, tuple(datasets), numeric=frozenset({1, 2, 3})))
    return blocks


def messages(events: Sequence[Event]) -> list[Block]:
    lost = [event for event in events if isinstance(event, WorkLost)]
    notices = [event for event in events if isinstance(event, Notice)]
    rows = [
        ("lost work", f"round {event.round}: {units.count(event.positions)} positions, {event.reason}")
        for event in lost[-_MAX_NOTICES:]
    ]
    rows += [("notice", event.message) for event in notices[-_MAX_NOTICES:]]
    return [Heading("Messages"), Grid(("", ""), tuple(rows))] if rows else []


def configuration(plan: Plan) -> list[Block]:
    """All settings as they were resolved, and the versions that read them; folded."""
    if not plan.configuration:
        return []
    versions = ", ".join(f"{name} {version}" for name, version in plan.versions)
    return [Heading("Configuration", versions), Code(plan.configuration, folded="all settings")]
