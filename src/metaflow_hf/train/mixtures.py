"""What a mixture of datasets adds to a training: its part of the specification, its plan, and what was trained of it."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from metaflow_hf.config import TrainConfig
from metaflow_hf.data.mixed_order import MixedOrder, OrderPart, samples_of_mixture
from metaflow_hf.data.mixture import MixedBlocks
from metaflow_hf.errors import ConfigError
from metaflow_hf.events import ClaimDone
from metaflow_hf.report import parse_events
from metaflow_hf.train.lineage import ClosedRound, Lineage
from metaflow_hf.train.ranges import Positions
from metaflow_hf.train.stored_metrics import stored_metrics

# This part of the measured rows is shared out evenly, so that a small dataset is measured well enough.
_MEASURED_EVENLY: Final = 1 / 4


def describe_parts(blocks: MixedBlocks, config: TrainConfig) -> list[dict[str, Any]]:
    """The datasets as the order of a specification lists them.

    ``rows`` is how many samples a run trains, which the order of whole claims may change by less than one claim. Raises
    ``ConfigError`` for a dataset without samples.
    """
    settings = [config.data.only(number) for number in range(len(blocks.parts))]
    weights = [one.weight for one in config.data.datasets]
    samples = [part.samples for part in blocks.parts]
    for number, count in enumerate(samples):
        if count < 1:
            raise ConfigError(
                f"data.datasets[{number}] ({blocks.parts[number].name}) has no samples: remove it, or name another source."
            )
    rows = samples_of_mixture(
        [count * data.epochs for count, data in zip(samples, settings, strict=True)], weights
    )
    return [
        {
            "blocks": len(blocks.blocks_of(number)),
            "samples": samples[number],
            "epochs": settings[number].epochs,
            "weight": weights[number],
            "rows": round(rows[number]),
        }
        for number in range(len(samples))
    ]


def mixed_order(order: Mapping[str, Any], block_samples: Sequence[int]) -> MixedOrder:
    """The order of a mixture that a specification describes; ``block_samples`` are those of all blocks."""
    parts, start = [], 0
    for one in order["datasets"]:
        stop = start + one["blocks"]
        parts.append(
            OrderPart(block_samples=block_samples[start:stop], epochs=one["epochs"], weight=one["weight"])
        )
        start = stop
    return MixedOrder(
        parts,
        order["chunk_samples"],
        order["claim_samples"],
        seed=order["seed"],
        shuffle=order["shuffle"],
    )


def spec_datasets(blocks: MixedBlocks, config: TrainConfig) -> list[dict[str, str]]:
    """The datasets as a specification names them: for people, and for whoever looks for the blocks."""
    named = zip(blocks.parts, config.data.datasets, strict=True)
    found = []
    for part, one in named:
        manifest = part.blocks.manifest
        facts = {
            "name": part.name,
            "dataset": one.unpinned,
            "commit": manifest.commit_hash,
            "key": manifest.dataset_name,
            "digest": manifest.digest,
        }
        found.append({name: value for name, value in facts.items() if value})
    return found


def measured_samples(blocks: MixedBlocks, config: TrainConfig) -> list[int]:
    """How many held-out rows of each dataset are measured, at least one.

    A quarter of them is shared out evenly, the rest in proportion to what is trained.
    """
    wanted = config.evaluation.max_samples
    rows = [one["rows"] for one in describe_parts(blocks, config)]
    least = max(int(_MEASURED_EVENLY * wanted / len(rows)), 1)
    left = max(wanted - least * len(rows), 0)
    return [least + left * count // sum(rows) for count in rows]


def trained_datasets(lineage: Lineage, closed: ClosedRound, order: MixedOrder) -> list[dict[str, Any]]:
    """What a model was trained on, dataset by dataset: ``rows`` of its claims, their ``share``, ``tokens`` with loss.

    Tokens are counted by claim. Claims whose worker was killed before it stored its metrics get an equal part of the
    tokens that are left.
    """
    spec, manifest = lineage.spec(), closed.manifest
    done = Positions.from_ranges(manifest.done)
    rows = order.samples_at(done.ranges)
    counted = {
        event.position: event.tokens
        for text in stored_metrics(lineage.store).values()
        for event in parse_events(text)
        if isinstance(event, ClaimDone) and event.position in done
    }
    tokens = [0] * len(rows)
    known = [(position, position + 1) for position in counted]
    for position, number in counted.items():
        tokens[order.part_of(position)] += number
    missing = [total - seen for total, seen in zip(rows, order.samples_at(known), strict=True)]
    left = max(manifest.tokens - sum(tokens), 0)
    for number, count in enumerate(missing):
        if sum(missing[number:]):
            part = round(left * count / sum(missing[number:]))
            tokens[number], left = tokens[number] + part, left - part
    return [
        {
            "name": one["name"],
            "dataset": one["dataset"],
            "rows": rows[number],
            "share": rows[number] / max(sum(rows), 1),
            "tokens": tokens[number],
        }
        for number, one in enumerate(spec.datasets or ())
    ]
