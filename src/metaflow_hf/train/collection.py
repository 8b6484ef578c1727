"""Frees what trainings leave behind: tensors, claims, heartbeats and metrics of lineages that nobody will go on with.

    exported                the model is in ``models/``; nothing of a final lineage is needed any more
    idle for 30 days        no new object below the lineage, by the store's own times
    ``rounds.keep: all``    stays whole, for ever

What says what happened stays in every case: ``spec.json``, ``rounds/``, ``exports/``. No reference points below
``training/``, so no model can be lost here.
"""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any, Final, Literal

from metaflow_hf.store.collection import clock_of
from metaflow_hf.store.objects import ObjectInfo, ObjectStore
from metaflow_hf.train.lineage import KEEP_ALL, PAYLOAD_KINDS

logger = logging.getLogger("metaflow_hf.train")

IDLE: Final = timedelta(days=30)
ROOT: Final = "training"

Reason = Literal["exported", "idle"]


@dataclass(frozen=True, slots=True)
class CollectedLineage:
    """What one lineage gave back, or would: objects and their bytes."""

    lineage: str
    reason: Reason
    objects: int
    bytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def collect_lineages(
    store: ObjectStore, *, dry_run: bool = False, now: Callable[[], datetime] | None = None
) -> list[CollectedLineage]:
    """Deletes the payloads of exported and of idle lineages; ``store`` is the root that holds ``training/``.

    Safe while others train: whatever a worker, a merge or an export writes makes its lineage young again. One that
    comes back to a lineage after more than 30 silent days finds its rounds and no weights. ``dry_run`` changes nothing.
    """
    moment = (now or clock_of(store, dry_run=dry_run))()
    found = []
    for name in store.children(ROOT):
        lineage = store.child(f"{ROOT}/{name}")
        reason, payloads = _judge(lineage, moment)
        if reason is None or not payloads:
            continue
        found.append(CollectedLineage(name, reason, len(payloads), sum(info.size for info in payloads)))
        if not dry_run:
            for info in payloads:
                lineage.delete(info.key)
            logger.info("collected %s", found[-1].to_json())
    return found


def _judge(lineage: ObjectStore, moment: datetime) -> tuple[Reason | None, list[ObjectInfo]]:
    """Why the payloads of a lineage may go, if they may; and these."""
    objects = list(lineage.list())
    kinds = {info.key.partition("/")[0] for info in objects}
    payloads = [info for info in objects if info.key.partition("/")[0] in PAYLOAD_KINDS]
    if KEEP_ALL in kinds:
        return None, payloads
    if "exports" in kinds:
        return "exported", payloads
    is_idle = all(moment - info.last_modified >= IDLE for info in objects)
    return ("idle" if is_idle else None), payloads
