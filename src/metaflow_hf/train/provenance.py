"""Where a model is from: the lineage that trained it, its commits, data, chunks and rounds, and the model before it."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import msgspec

from metaflow_hf.errors import NotFound
from metaflow_hf.store import ObjectStore, quote_part
from metaflow_hf.store.models import find_reference
from metaflow_hf.train.lineage import Lineage
from metaflow_hf.train.ranges import Positions
from metaflow_hf.train.results import count_in, find_results
from metaflow_hf.train.status import count_chunks, stored_order

# A chain of models that is longer than this goes round in a circle.
_LONGEST: Final = 100
# What a model says itself, for when its lineage is gone.
_OLD_NAMES: Final = {"model": "base_model", "dataset": "dataset"}


@dataclass(frozen=True, kw_only=True)
class TrainedRound:
    """One round that is in the model: who contributed how many tokens, and the claims that were lost in it."""

    round: int
    tokens: int
    contributions: Mapping[str, int]
    lost: int


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What is known of one model; empty where nothing is kept of it any more.

    ``sources`` are the model and dataset that training began with and their commits, ``dataset`` the key and digest of
    its block manifest; ``datasets`` are those of a mixture, each with name, source, commit, key and digest. ``positions`` are ranges of claims that the weights contain, ``skipped`` those that were given up;
    a chunk is done when all its claims are, each epoch counts its own. ``base_key`` is the reference that training went on
    from, where that was a model of this datastore.
    """

    key: str
    digest: str
    pathspec: str
    created_on: str
    lineage: str = ""
    run: str = ""
    sources: Mapping[str, str]
    dataset: Mapping[str, str]
    order: Mapping[str, Any]
    datasets: tuple[Mapping[str, str], ...] = ()
    positions: tuple[tuple[int, int], ...] = ()
    positions_total: int = 0
    skipped: tuple[tuple[int, int], ...] = ()
    chunks_done: int | None = None
    chunks_total: int | None = None
    tokens: int = 0
    rounds: tuple[TrainedRound, ...] = ()
    figures: Mapping[str, Mapping[str, Any]]
    base_key: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def provenance(store: ObjectStore, reference: Mapping[str, Any]) -> Iterator[Provenance]:
    """The model first, then what it was trained from, and so on down to a repository of the hub.

    ``store`` is the root. Ends where nothing more is stored. Reads every round's manifest of each lineage.
    """
    known: Mapping[str, Any] | None = reference
    for _ in range(_LONGEST):
        if known is None:
            return
        found = _of(store, known)
        yield found
        known = _reference(store, found.base_key)


def _reference(store: ObjectStore, key: str) -> Mapping[str, Any] | None:
    if not key.startswith("models/"):
        return None
    try:
        return find_reference(store, key).to_json()
    except NotFound:
        return None


def _of(store: ObjectStore, reference: Mapping[str, Any]) -> Provenance:
    metadata: Mapping[str, Any] = reference.get("metadata", {})
    name = str(metadata.get("lineage", ""))
    results = find_results(store, reference)
    facts: dict[str, Any] = {
        "key": str(reference["key"]),
        "digest": str(reference["digest"]),
        "pathspec": str(reference.get("pathspec", "")),
        "created_on": str(reference.get("created_on", "")),
        "lineage": name,
        "run": results.run if results is not None else "",
        "figures": results.figures if results is not None else {},
    }
    place = store.child(f"training/{quote_part(name)}") if name else None
    if place is None or not place.children("rounds"):
        sources = {kind: str(metadata[old]) for kind, old in _OLD_NAMES.items() if metadata.get(old)}
        return Provenance(**facts, sources=sources, dataset={}, order={}, tokens=count_in(metadata, "tokens"))
    return Provenance(**facts, **_lineage_facts(store, Lineage(place), count_in(metadata, "rounds")))


def _lineage_facts(store: ObjectStore, lineage: Lineage, last: int) -> dict[str, Any]:
    spec = lineage.spec()
    closed = lineage.round(last) or lineage.newest()
    assert closed is not None
    done = Positions.from_ranges(closed.manifest.done)
    order = stored_order(store, spec)
    chunks = count_chunks(order, done) if order is not None else (None, None)
    return {
        "sources": dict(spec.sources),
        "dataset": dict(spec.dataset),
        "order": dict(spec.order),
        "datasets": () if isinstance(spec.datasets, msgspec.UnsetType) else tuple(spec.datasets),
        "positions": tuple((start, stop) for start, stop in closed.manifest.done),
        "positions_total": spec.num_positions,
        "skipped": tuple((start, stop) for start, stop in closed.manifest.skipped),
        "chunks_done": chunks[0],
        "chunks_total": chunks[1],
        "tokens": closed.manifest.tokens,
        "rounds": tuple(_rounds(lineage, closed.number)),
        "base_key": spec.sources.get("model_key", ""),
    }


def _rounds(lineage: Lineage, last: int) -> Iterator[TrainedRound]:
    before = lineage.round(0)
    for number in range(1, last + 1):
        closed = lineage.round(number)
        if closed is None or before is None:
            return
        manifest = closed.manifest
        yield TrainedRound(
            round=number,
            tokens=sum(item.tokens for item in manifest.accepted),
            contributions={item.attempt: item.tokens for item in manifest.accepted},
            lost=manifest.lost_since(before.manifest),
        )
        before = closed
