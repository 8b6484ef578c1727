"""What a training came to, kept beside its rounds: for model cards and for whoever asks where a model is from.

``results/<digest of the model>.json`` below the lineage; never collected, and small whatever the run was.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

import msgspec

from metaflow_hf.errors import NotFound
from metaflow_hf.events import Evaluated, Event
from metaflow_hf.report import series
from metaflow_hf.report.outcome import Outcome
from metaflow_hf.store.objects import ObjectStore, encode_json, quote_part
from metaflow_hf.train.records import Record, decode

_FOLDER: Final = "results"
ALL_WORKERS: Final = "all workers"


class StoredResults(Record, frozen=True, kw_only=True):
    """Figures by name (``before``, ``after``, ``unigram``), samples, and the curves [tokens, loss] of the run.

    ``datasets`` are those of a mixture, each with what was trained of it and its losses.

    Figures that are not finite, for which JSON has no word, are their names: ``float`` reads both.
    """

    figures: dict[str, dict[str, Any]]
    samples: list[dict[str, Any]]
    plan: dict[str, Any]
    training_loss: list[tuple[int, float]]
    held_out_loss: list[tuple[int, float]]
    tokens: int
    seconds: float
    run: str
    datasets: tuple[dict[str, Any], ...] = ()
    schema: int = 1


def store_results(lineage: ObjectStore, outcome: Outcome, events: Sequence[Event]) -> None:
    """Keeps the outcome of the run whose lineage is at ``lineage``; again for the same model replaces it."""
    assert outcome.model is not None
    points = series.step_points(events, _as_one(events))
    measured = (("before", outcome.before), ("after", outcome.after), ("unigram", outcome.unigram))
    record = StoredResults(
        figures={name: _named(asdict(found)) for name, found in measured if found is not None},
        samples=[asdict(sample) for sample in outcome.samples],
        plan={**asdict(outcome.plan), "configuration": ""},
        training_loss=[(point.tokens, point.loss) for point in points],
        held_out_loss=[
            (event.tokens_total, event.loss)
            for event in events
            if isinstance(event, Evaluated) and event.round and math.isfinite(event.loss)
        ],
        tokens=outcome.tokens,
        seconds=outcome.seconds,
        run=outcome.run_pathspec,
        datasets=tuple(_named(asdict(one)) for one in outcome.datasets),
    )
    lineage.put(_key(outcome.model), encode_json(msgspec.to_builtins(record)))


def find_results(store: ObjectStore, reference: Mapping[str, Any]) -> StoredResults | None:
    """What is kept of the run that made a model, in the root ``store``; ``None`` when nothing is."""
    lineage = reference.get("metadata", {}).get("lineage")
    if not lineage:
        return None
    key = f"training/{quote_part(str(lineage))}/{_key(reference)}"
    try:
        return decode(StoredResults, store.get(key), where=key)
    except NotFound:
        return None


def count_in(metadata: Mapping[str, Any], name: str) -> int:
    """A count in a model's metadata; 0 where there is none, or something else by that name: users write theirs too."""
    value = metadata.get(name)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        return 0
    return int(value)


def _named(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in figures.items()
    }


def _key(reference: Mapping[str, Any]) -> str:
    return f"{_FOLDER}/{reference['digest']}.json"


def _as_one(events: Sequence[Event]) -> dict[str, str]:
    return dict.fromkeys(series.worker_labels(events), ALL_WORKERS)
