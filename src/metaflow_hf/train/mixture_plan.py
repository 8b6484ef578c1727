"""What reports say about the datasets of a mixture: before training from a survey, after it from the model."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from metaflow_hf.config import TrainConfig
from metaflow_hf.data.mixed_order import part_seed
from metaflow_hf.data.mixture import MixedBlocks, ReadableBlocks
from metaflow_hf.data.order import ClaimOrder, Order
from metaflow_hf.report.outcome import DatasetResult, Plan
from metaflow_hf.train.blocks import naming_dataset
from metaflow_hf.train.evaluation import Evaluation
from metaflow_hf.train.sides import HeldOutRow
from metaflow_hf.train.survey import Survey


def survey_mixture(
    blocks: MixedBlocks,
    order: Mapping[str, Any],
    config: TrainConfig,
    survey: Callable[[ReadableBlocks, Order], Survey],
) -> Survey:
    """The survey of a mixture, from a survey of one epoch of each dataset.

    Args:
        blocks: The datasets.
        order: The order of a specification.
        config: The configuration.
        survey: Surveys a dataset in an order.

    Raises:
        ConfigError: when nothing of a dataset would be trained, with the place of the dataset in the configuration.
        BadRowError: for a row that cannot be used, in the same way.

    """
    found = []
    for number in range(len(blocks.parts)):
        alone = blocks.alone(number)
        claims = ClaimOrder(
            alone.manifest.blocks,
            order["chunk_samples"],
            order["claim_samples"],
            seed=part_seed(order["seed"], number),
            shuffle=order["shuffle"],
        )
        with naming_dataset(config.data, number):
            found.append(survey(alone, claims))
    return Survey.of_mixture(found, [one["rows"] for one in order["datasets"]])


def heldout_rows_of(found: Survey, order: Mapping[str, Any], samples: int) -> int:
    """How many of ``samples`` rows are held out; of a mixture each row once, however often its dataset is trained."""
    if not found.parts:
        return found.scaled(found.held_out, samples)
    pairs = zip(found.parts, order["datasets"], strict=True)
    return sum(part.scaled(part.held_out, one["samples"]) for part, one in pairs)


def plan_datasets(
    order: Mapping[str, Any], config: TrainConfig, found: Survey, *, fraction: float
) -> tuple[dict[str, Any], ...]:
    """Rows and tokens with loss that a run trains of each dataset, and its share of all rows.

    Args:
        order: The order of a specification.
        config: The configuration.
        found: The survey of the mixture.
        fraction: The part of the order that is trained: less than 1 where ``rounds.max_tokens`` ends the run.

    """
    described = order.get("datasets", ())
    total = sum(one["rows"] for one in described)
    return tuple(
        {
            "name": named.title,
            "dataset": named.dataset,
            "rows": round(part.scaled(part.trained, one["rows"]) * fraction),
            "tokens": round(part.scaled(part.tokens, one["rows"]) * fraction),
            "share": one["rows"] / total,
        }
        for named, one, part in zip(config.data.datasets, described, found.parts, strict=True)
    )


def ends_with(order: Mapping[str, Any], config: TrainConfig) -> list[str]:
    """Which dataset ends a weighted mixture, and how much of the others is trained until then."""
    described = order.get("datasets", ())
    if not described or described[0]["weight"] is None:
        return []
    names = [one.title for one in config.data.datasets]
    parts = [one["rows"] / (one["samples"] * one["epochs"]) for one in described]
    # Of several that end together the first one is named.
    last = max(range(len(parts)), key=lambda number: (parts[number], -number))
    one = described[last]
    times = "" if one["epochs"] == 1 else f", {one['epochs']} times"
    others = [
        f"{_percent(described[number]['rows'] / described[number]['samples'])} of {names[number]}"
        for number in range(len(names))
        if number != last
    ]
    trained = f", when {' and '.join(others)} are trained" if others else ""
    note = f"the mixture ends when {names[last]} has run out (its {one['samples']:,} rows{times}){trained}."
    unused = [
        f"no row of {names[number]} is trained: its weight asks for less than half a claim. Raise its weight, or lower "
        f"rounds.claim_samples = {order['claim_samples']}."
        for number, one in enumerate(described)
        if one["rows"] == 0
    ]
    return [f"{note} A larger epochs of that dataset repeats it.", *unused]


def dataset_results(
    plan: Plan,
    metadata: Mapping[str, Any],
    rows: Sequence[HeldOutRow],
    before: Evaluation,
    after: Evaluation,
) -> tuple[DatasetResult, ...]:
    """What was trained of each dataset, and the losses of its held-out rows.

    Args:
        plan: The plan of the run, which names the datasets; its figures stand in where ``metadata`` has none.
        metadata: The metadata of the model's reference.
        rows: The rows that were measured.
        before: How well the untrained model predicts ``rows``.
        after: How well the trained model predicts them.

    """
    trained = metadata.get("datasets") or plan.datasets
    found = []
    for one in trained:
        name = one["name"]
        loss_before, _ = _loss(before, rows, name)
        loss_after, tokens = _loss(after, rows, name)
        found.append(
            DatasetResult(
                name=name,
                rows=one["rows"],
                share=one["share"],
                tokens=one["tokens"],
                loss_before=loss_before,
                loss_after=loss_after,
                measured_tokens=tokens,
            )
        )
    return tuple(found)


def _loss(measured: Evaluation, rows: Sequence[HeldOutRow], name: str) -> tuple[float | None, int]:
    """The loss per token of the rows of one dataset, and their tokens."""
    documents = [one for one in measured.documents if rows[one.index].dataset == name]
    tokens = sum(one.tokens for one in documents)
    return (math.fsum(one.loss * one.tokens for one in documents) / tokens if tokens else None), tokens


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.3g} %"
