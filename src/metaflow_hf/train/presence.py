"""Who is at work in a lineage, as somebody sees it who only looks: heartbeats that move while they are watched."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal

from metaflow_hf.errors import NotFound
from metaflow_hf.train.heartbeat import process_is_gone
from metaflow_hf.train.lineage import ClosedRound, Lineage

WATCH_SECONDS: Final = 5.0
_LOOK_SECONDS: Final = 1.0

WorkerState = Literal["working", "silent", "gone"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus:
    """One attempt that is at work, or whose claims the open round has.

    ``working``: its heartbeat moved while it was watched. ``silent``: it did not, and others wait for it until it was
    silent for ``allowance_seconds``. ``gone``: it has left, its process ended on this machine, or it was silent for
    longer than that while others moved. ``last_beat`` is ``None`` without a heartbeat.
    """

    attempt: str
    state: WorkerState
    claims: int
    published: bool
    last_beat: datetime | None
    allowance_seconds: float | None


def _has_ended(beat: "_Beat", facts: Mapping[str, Any], now: datetime) -> bool:
    if facts["process"] and process_is_gone(facts["process"]):
        return True
    return (now - beat.moment).total_seconds() > float(facts["allowance_seconds"])


@dataclass(frozen=True, slots=True)
class _Beat:
    content: bytes
    moment: datetime


def workers_of(
    lineage: Lineage,
    newest: ClosedRound,
    claims: Mapping[int, str],
    *,
    seconds: float = WATCH_SECONDS,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[WorkerStatus, ...]:
    """Everybody who is at work or has one of the ``claims`` of the open round, by attempt; nobody in a final lineage.

    Watches for at most ``seconds``, less when all have moved. Raises ``StoreUnavailable``.
    """
    if newest.manifest.final:
        return ()
    first = _beats(lineage)
    moved, latest = _watch(lineage, first, seconds, sleep)
    published = set(lineage.published(newest.number))
    # The store's own clock, as far as it has been seen to go.
    now = max((beat.moment for beat in latest.values()), default=None)
    found = []
    for attempt in sorted({*first, *latest, *claims.values()}):
        beat = latest.get(attempt)
        facts = json.loads(beat.content) if beat else {}
        is_gone = attempt not in moved and (beat is None or _has_ended(beat, facts, now or beat.moment))
        if is_gone and attempt not in claims.values():
            continue  # the heartbeat of whoever was killed stays
        found.append(
            WorkerStatus(
                attempt=attempt,
                state="gone" if is_gone else "working" if attempt in moved else "silent",
                claims=sum(1 for owner in claims.values() if owner == attempt),
                published=attempt in published,
                last_beat=beat.moment if beat else None,
                allowance_seconds=facts.get("allowance_seconds"),
            )
        )
    return tuple(found)


def _watch(
    lineage: Lineage, first: Mapping[str, _Beat], seconds: float, sleep: Callable[[float], None]
) -> tuple[set[str], dict[str, _Beat]]:
    """Whose heartbeat was seen to move or to appear, and the last look at all of them."""
    latest, moved, left = dict(first), set[str](), seconds
    while left > 0 and first.keys() - moved:
        pause = min(left, _LOOK_SECONDS)
        sleep(pause)
        left -= pause
        latest = _beats(lineage)
        moved |= {
            name for name, beat in latest.items() if name not in first or beat.content != first[name].content
        }
        # Who has gone will not move.
        first = {name: beat for name, beat in first.items() if name in latest}
    return moved, latest


def _beats(lineage: Lineage) -> dict[str, _Beat]:
    found = {}
    for info in lineage.store.list("heartbeats"):
        try:
            content = lineage.store.get(info.key)
        except NotFound:
            continue  # it has just left
        found[info.key.rpartition("/")[2]] = _Beat(content, info.last_modified)
    return found
