"""The page of a training run: the outcome in the first screen, then the curves, the rounds, the data, the model.

A pure function of the plan, the events so far and, at the end, the outcome; while training runs it is drawn
again and again from the events that there are.
"""

from collections.abc import Sequence

from metaflow_hf.events import Event, StepDone
from metaflow_hf.report import card_sections as sections
from metaflow_hf.report import series, text, units
from metaflow_hf.report.outcome import Outcome, Plan
from metaflow_hf.report.page import Block, Page, Progress, Tile, Tiles, Title
from metaflow_hf.report.series import RoundRow


def training_page(plan: Plan, events: Sequence[Event], outcome: Outcome | None = None) -> Page:
    """The page of a run; ``events`` of all workers in the order of time, ``outcome`` once it is over.

    Parts without data are left out. Size: bounded whatever the length of the run.
    """
    labels = series.worker_labels(events)
    rounds = series.round_rows(events, labels)
    blocks: list[Block] = [_title(plan, outcome)]
    if outcome is None:
        blocks += _progress(plan, events, rounds)
    blocks.append(_tiles(plan, events, rounds, outcome))
    if outcome is not None:
        blocks += sections.evaluation(outcome) + sections.tasks(outcome)
    blocks += sections.curves(events, labels, rounds, outcome)
    blocks += sections.samples(events, outcome)
    if outcome is not None:
        blocks += sections.worst_rows(outcome) + sections.model(outcome)
    blocks += sections.messages(events)
    blocks += sections.rounds(rounds, sections.names(labels))
    blocks += sections.positions(events, labels, rounds)
    blocks += sections.machine(events, labels)
    blocks += sections.plan(plan) + sections.configuration(plan)
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


def _progress(plan: Plan, events: Sequence[Event], rounds: Sequence[RoundRow]) -> list[Block]:
    """How much of the run is over, and how long the rest will take at the pace of the last rounds."""
    steps = [event for event in events if isinstance(event, StepDone)]
    if not steps:
        return []
    done = rounds[-1].tokens_total if rounds else steps[-1].tokens_total
    planned = steps[-1].tokens_planned or plan.tokens
    if not planned:
        return []
    if rounds and rounds[-1].final:
        return [Progress(1.0, "training is over; the model is merged and measured next")]
    left = series.seconds_left(events, planned)
    eta = f", about {units.duration(left)} left" if left is not None else ""
    return [Progress(min(done / planned, 1.0), f"{units.percent(done, planned)} of the tokens{eta}")]


def _workers(number: int) -> str:
    return "1 worker" if number == 1 else f"{number} workers"
