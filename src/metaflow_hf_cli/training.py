"""``metaflow hf training``: how the trainings in the datastore are doing. Reads only."""

import difflib
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from metaflow._vendor import click

from metaflow_hf.errors import NotFound

from .output import explained, json_option, print_json, print_table, printable, say_on_stderr

if TYPE_CHECKING:
    from metaflow_hf.store import ObjectStore
    from metaflow_hf.train.lineage import Lineage
    from metaflow_hf.train.status import LineageStatus, RoundStatus

_READERS: Final = 8
_POLL_SECONDS: Final = 2.0


@click.group(short_help="Trainings in the datastore: ls, status, log.")
def command() -> None:
    """How trainings are doing, by the lineages that `ls` prints; read from the store, no worker is asked."""


@command.command("ls", help="List trainings, the last active first.")
@json_option
@explained
def list_trainings(as_json: bool) -> None:
    """One line per lineage."""
    from metaflow_hf.report import units
    from metaflow_hf.store import configured_store

    root = configured_store()
    with ThreadPoolExecutor(_READERS) as pool:
        found = list(pool.map(lambda name: _status(root, name, last_rounds=1, watch=0.0), _names(root)))
    found.sort(key=lambda one: one.last_closed or datetime.min.replace(tzinfo=UTC), reverse=True)
    if as_json:
        print_json([_summary(one) for one in found])
        return
    rows = [
        (
            f"{one.last_closed:%Y-%m-%d %H:%M}" if one.last_closed else "-",
            one.state,
            "-" if one.round is None else one.round,
            units.percent(one.positions_done, one.positions_total),
            units.short_count(one.tokens),
            units.loss(one.loss),
            one.lineage,
        )
        for one in found
    ]
    headings = ("LAST ROUND (UTC)", "STATE", ">ROUND", ">DONE", ">TOKENS", ">LOSS", "LINEAGE")
    print_table(headings, rows, empty="no trainings are stored")


@command.command(
    short_help="How far a training is, and who is at work.",
    help="Show how far a training is, who is at work, its last rounds, and what failed. Watches the workers' heartbeats "
    "for some seconds: who is in a long step may look silent.",
)
@click.argument("lineage")
@click.option(
    "--watch",
    default=5.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to watch at most; 0: not at all.",
)
@click.option(
    "--last", default=20, show_default=True, type=click.IntRange(min=1), help="How many rounds to show."
)
@json_option
@explained
def status(lineage: str, watch: float, last: int, as_json: bool) -> None:
    """Everything that the store says about one lineage."""
    from metaflow_hf.store import configured_store

    from .training_text import ROUND_HEADINGS, print_failing, print_workers, round_row, status_lines

    root = configured_store()
    name = _find(root, lineage)
    if watch > 0 and not as_json:
        say_on_stderr(f"watching heartbeats for up to {watch:g} s …")
    found = _status(root, name, last_rounds=last, watch=watch)
    if as_json:
        print_json(found.to_json())
        return
    for line in status_lines(found):
        click.echo(printable(line))
    print_workers(found.workers)
    print_failing(found.failing)
    if found.rounds:
        click.echo()
        print_table(ROUND_HEADINGS, [round_row(one) for one in found.rounds], empty="")


@command.command(
    short_help="The rounds of a training, one line each.",
    help="Show the rounds of a training, one line each; with --json one JSON object a line.",
)
@click.argument("lineage")
@click.option("--follow", is_flag=True, help="Go on with each new round, until the last one.")
@click.option("--last", type=click.IntRange(min=1), help="Only the last so many; all by default.")
@json_option
@explained
def log(lineage: str, follow: bool, last: int | None, as_json: bool) -> None:
    """Rounds as they were closed."""
    from metaflow_hf.store import configured_store

    from .training_text import round_line

    root = configured_store()
    for one in _rounds(_open(root, _find(root, lineage)), last=last, follow=follow):
        if as_json:
            click.echo(json.dumps(asdict(one), default=str))
        else:
            click.echo(printable(round_line(one)))
            for attempt, reason in one.rejected.items():
                click.echo(printable(f"  the work of {attempt} is not used: {reason}"))


def _rounds(lineage: "Lineage", *, last: int | None, follow: bool) -> "Iterator[RoundStatus]":
    from metaflow_hf.train.status import closed_rounds

    newest = lineage.newest()
    seen = -1 if last is None or newest is None else newest.number - last
    while True:
        found = closed_rounds(lineage, after=seen)
        yield from found
        if not follow or (found and found[-1].final):
            return
        seen = found[-1].round if found else seen
        time.sleep(_POLL_SECONDS)


def _names(root: "ObjectStore") -> list[str]:
    return root.children("training")


def _open(root: "ObjectStore", name: str) -> "Lineage":
    from metaflow_hf.train.lineage import Lineage

    return Lineage(root.child(f"training/{name}"))


def _find(root: "ObjectStore", lineage: str) -> str:
    """The key part of a lineage that its users call so. Raises ``NotFound`` that names the nearest."""
    from metaflow_hf.store import quote_part

    names = _names(root)
    for name in (lineage, quote_part(lineage)):
        if name in names:
            return name
    near = difflib.get_close_matches(lineage, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise NotFound(f"no training {lineage!r} is stored{hint} See `metaflow hf training ls`.")


def _status(root: "ObjectStore", name: str, *, last_rounds: int, watch: float) -> "LineageStatus":
    from metaflow_hf.train.status import lineage_status, stored_order

    return lineage_status(
        _open(root, name),
        name=name,
        find_order=lambda spec: stored_order(root, spec) if last_rounds > 1 else None,
        last_rounds=last_rounds,
        watch_seconds=watch,
    )


def _summary(found: "LineageStatus") -> dict[str, Any]:
    facts = found.to_json()
    return {name: facts[name] for name in facts if name not in ("rounds", "workers", "failing")}
