"""Frees the bytes that nothing refers to any more, while others write.

No store deletes conditionally, and a check before a deletion races with writers. So there are two passes: the first
condemns, by a record, what no manifest names; only a later one, days after that record and after reading all
manifests again, deletes. A writer that finds a record takes the next generation of the key, and looks once more when
its manifest is visible. No record is ever taken back, whether its blob was deleted or is in use again: a slow writer,
or another collection, may still act on what it saw before.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from metaflow_hf.errors import SelectionError, StoreUnavailable
from metaflow_hf.store.blobs import CONDEMNED, content_of
from metaflow_hf.store.manifests import read_manifests
from metaflow_hf.store.objects import ObjectInfo, ObjectStore, Unfinished, encode_json, new_nonce

logger = logging.getLogger("metaflow_hf.store")

MIN_KEEP_DAYS: Final = 7
# What is younger may belong to an upload under way; condemning it would only make the writer store it twice.
YOUNG: Final = timedelta(days=1)
# All that may name blobs; what training still works on is stored elsewhere.
NAMING: Final = ("manifests", "models", "checkpoints")
# Notes of downloads that have no manifest yet: hints, which name nothing.
ARRIVALS: Final = "arrivals"
_CLOCK: Final = "gc/clock"


@dataclass(frozen=True, slots=True)
class Collected:
    """What one pass did, or would do: blob keys with their sizes in bytes.

    ``condemned`` are new, ``deleted`` are gone, ``waiting`` were condemned earlier and are not old enough, ``spared``
    were condemned and are in use again: they stay for as long as a manifest names them. ``unfinished`` are files of
    killed writers on a local disk, gone too.
    """

    condemned: dict[str, int]
    deleted: dict[str, int]
    waiting: dict[str, int]
    spared: dict[str, int]
    unfinished: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        return {
            name: {"blobs": len(blobs), "bytes": sum(blobs.values())}
            for name, blobs in (
                ("condemned", self.condemned),
                ("deleted", self.deleted),
                ("waiting", self.waiting),
                ("spared", self.spared),
                ("unfinished", self.unfinished),
            )
        }


def collect(
    store: ObjectStore,
    *,
    keep_days: float = MIN_KEEP_DAYS,
    dry_run: bool = False,
    now: Callable[[], datetime] | None = None,
) -> Collected:
    """One pass: condemns what is unreferenced, and deletes what has been condemned for ``keep_days`` (at least 7).

    Safe while any number of others write, load and collect. ``dry_run`` changes nothing. ``now`` is the store's own
    clock by default. Raises ``SelectionError`` for fewer days, and ``IntegrityError`` for a damaged manifest, whose
    blobs cannot be known. What killed downloads noted goes after the same time; what killed writers left on a local
    disk, which nobody can read, when it was not touched for a day.
    """
    if keep_days < MIN_KEEP_DAYS:
        raise SelectionError(
            f"keep_days={keep_days} is too few: a slow upload may need what was condemned for {MIN_KEEP_DAYS} days."
        )
    moment = (now or clock_of(store, dry_run=dry_run))()
    records = {info.key.removeprefix(f"{CONDEMNED}/"): info for info in store.list(CONDEMNED)}
    blobs = {info.key: info for info in store.list("blobs")}
    # Last of the three: whatever became visible until now counts.
    is_named = _named(store, records)
    result = Collected({}, {}, {}, {}, {})
    for key, info in blobs.items():
        fate = _fate(result, info, records.get(key), is_named(key), moment, timedelta(days=keep_days))
        fate[key] = info.size
    abandoned = [part for part in store.unfinished() if moment - part.last_modified >= YOUNG]
    result.unfinished.update((str(part.path), part.size) for part in abandoned)
    if not dry_run:
        _remove(abandoned)
        _carry_out(store, result)
        for info in store.list(ARRIVALS):
            if moment - info.last_modified >= timedelta(days=keep_days):
                store.delete(info.key)
    return result


def _remove(files: list[Unfinished]) -> None:
    for file in files:
        try:
            file.path.unlink(missing_ok=True)
        except OSError as error:
            raise StoreUnavailable(
                f"{file.path}, which a killed writer left, cannot be removed: {error.strerror}. Collect as the user that "
                "the datastore belongs to."
            ) from error


def unreferenced(store: ObjectStore) -> dict[str, int]:
    """The blobs that no manifest names, with their sizes: what collections will free in the end."""
    records = {info.key.removeprefix(f"{CONDEMNED}/"): info for info in store.list(CONDEMNED)}
    blobs = {info.key: info.size for info in store.list("blobs")}
    is_named = _named(store, records)
    return {key: size for key, size in blobs.items() if not is_named(key)}


def _named(store: ObjectStore, records: dict[str, ObjectInfo]) -> Callable[[str], bool]:
    named = {
        file.blob
        for prefix in NAMING
        for _, manifest in read_manifests(store, prefix)
        for file in manifest.files
    }
    # Where a manifest names a condemned key, its bytes may have been healed under another generation.
    healed = {content_of(key) for key in named if key in records}
    return lambda key: key in named or content_of(key) in healed


def _fate(
    result: Collected,
    info: ObjectInfo,
    record: ObjectInfo | None,
    is_named: bool,
    moment: datetime,
    keep: timedelta,
) -> dict[str, int]:
    if record is None:
        is_young = moment - info.last_modified < YOUNG
        return {} if is_named or is_young else result.condemned
    if is_named:
        return result.spared
    return result.deleted if moment - record.last_modified >= keep else result.waiting


def _carry_out(store: ObjectStore, result: Collected) -> None:
    for key in result.condemned:
        store.create(f"{CONDEMNED}/{key}", encode_json({"nonce": new_nonce()}))
    for key in result.deleted:
        store.delete(key)
    logger.info("collected %s: %s", store.uri, result.to_json())


def clock_of(store: ObjectStore, *, dry_run: bool) -> Callable[[], datetime]:
    """The store's own clock, which its objects' times are of; the host's for a rehearsal, which writes nothing."""

    def ask() -> datetime:
        store.put(_CLOCK, encode_json({"nonce": new_nonce()}))
        return store.head(_CLOCK).last_modified

    return (lambda: datetime.now(UTC)) if dry_run else ask
