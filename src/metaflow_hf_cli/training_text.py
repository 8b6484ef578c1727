"""What ``metaflow hf training`` shows of a lineage, as lines and tables for people."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from metaflow._vendor import click

from metaflow_hf.report import units

from .output import print_table

if TYPE_CHECKING:
    from metaflow_hf.train.presence import WorkerStatus
    from metaflow_hf.train.status import FailedPosition, LineageStatus, RoundStatus

_SHOWN_FAILURES: Final = 20


def status_lines(found: "LineageStatus") -> Iterator[str]:
    yield f"{found.lineage}: {_state(found)}"
    if found.round is None:
        return
    planned = found.tokens_planned
    rows = [
        ("round", f"{found.round}, closed {found.last_closed:%Y-%m-%d %H:%M:%S} UTC"),
        ("positions", _positions(found)),
        ("stopped", found.stopped),
        (
            "chunks",
            f"{units.count(found.chunks_done or 0)} of {units.count(found.chunks_total)} done"
            if found.chunks_total is not None
            else "",
        ),
        (
            "tokens",
            units.count(found.tokens)
            + (
                f" of about {units.count(planned)} ({units.percent(found.tokens, planned)})"
                if planned and found.state == "open"
                else ""
            ),
        ),
        ("loss", f"{units.loss(found.loss)} nats per token, last round" if found.loss is not None else ""),
        ("pace", _pace(found)),
        ("lost", _lost(found.rounds)),
        ("model", found.model or ""),
    ]
    for label, value in rows:
        if value:
            yield f"  {label:<9}  {value}"


def _state(found: "LineageStatus") -> str:
    if found.state == "starting":
        return "is being started: there is no round yet"
    if found.state != "open":
        return "final, its model is exported" if found.state == "exported" else "final, not exported yet"
    working = sum(1 for worker in found.workers if worker.state == "working")
    silent = sum(1 for worker in found.workers if worker.state == "silent")
    if not working and not silent:
        return "open, nobody is at work"
    parts = [f"{working} at work"] if working else []
    parts += [f"{silent} silent"] if silent else []
    return "open, " + ", ".join(parts)


def _positions(found: "LineageStatus") -> str:
    text = (
        f"{units.count(found.positions_done)} of {units.count(found.positions_total)} done "
        f"({units.percent(found.positions_done, found.positions_total)})"
    )
    for number, word in (
        (found.positions_claimed, "claimed"),
        (found.positions_left, "left"),
        (found.positions_skipped, "skipped"),
    ):
        text += f", {units.count(number)} {word}" if number else ""
    return text


def _pace(found: "LineageStatus") -> str:
    if found.tokens_per_second is None:
        return ""
    left = found.eta_seconds if found.state == "open" else None
    return f"{units.short_count(found.tokens_per_second)} tokens/s in the rounds below" + (
        f", about {units.duration(left)} left" if left is not None else ""
    )


def _lost(rounds: "Sequence[RoundStatus]") -> str:
    lost = sum(one.lost for one in rounds)
    rejected = sum(len(one.rejected) for one in rounds)
    if not lost and not rejected:
        return ""
    claims = "1 claim" if lost == 1 else f"{lost} claims"
    contributions = "1 contribution" if rejected == 1 else f"{rejected} contributions"
    return f"{claims} in the rounds below" + (f", {contributions} not used" if rejected else "")


def print_workers(workers: "Sequence[WorkerStatus]") -> None:
    if not workers:
        return
    now = datetime.now(UTC)

    def silent(worker: "WorkerStatus") -> str:
        if worker.state != "silent" or worker.last_beat is None or worker.allowance_seconds is None:
            return ""
        seconds = max((now - worker.last_beat).total_seconds(), 0.0)
        return f"{units.duration(seconds)}, may be {units.duration(worker.allowance_seconds)}"

    click.echo()
    rows = [
        (worker.attempt, worker.state, worker.claims, "yes" if worker.published else "", silent(worker))
        for worker in workers
    ]
    print_table(("WORKER", "STATE", ">CLAIMS", "PUBLISHED", "SILENT FOR"), rows, empty="")


def print_failing(failing: "Sequence[FailedPosition]") -> None:
    if not failing:
        return
    click.echo()
    rows = [
        (
            one.position,
            one.failures,
            "yes" if one.skipped else "",
            "-" if one.block_id is None else f"block {one.block_id}, rows {one.start} to {one.stop}",
        )
        for one in failing[:_SHOWN_FAILURES]
    ]
    print_table((">POSITION", ">LOST", "SKIPPED", "WHERE"), rows, empty="")
    if len(failing) > _SHOWN_FAILURES:
        click.echo(f"and {len(failing) - _SHOWN_FAILURES} more; --json lists all")


ROUND_HEADINGS: Final = (">ROUND", "CLOSED", ">WORKERS", ">POSITIONS", ">TOKENS", ">LOSS", ">TIME", ">LOST")


def round_row(one: "RoundStatus") -> tuple[object, ...]:
    return (
        one.round,
        f"{one.closed:%H:%M:%S}",
        one.contributors,
        one.positions,
        units.count(one.tokens),
        units.loss(one.loss),
        "-" if one.seconds is None else units.duration(one.seconds),
        one.lost or "",
    )


def round_line(one: "RoundStatus") -> str:
    parts = [
        f"{one.closed:%H:%M:%S} round {one.round}",
        "1 worker" if one.contributors == 1 else f"{one.contributors} workers",
        f"{units.count(one.positions)} positions",
        f"{units.count(one.tokens)} tokens",
        f"loss {units.loss(one.loss)}",
    ]
    parts += [units.duration(one.seconds)] if one.seconds is not None else []
    parts += [f"lost {one.lost}"] if one.lost else []
    parts += ["the last one"] if one.final else []
    return ", ".join(parts)
