"""Tables of the datasets of a mixture, for logs, terminals and cards: what is planned, and what came of it."""

from metaflow_hf.report import units
from metaflow_hf.report.outcome import Outcome, Plan

PLAN_HEADERS = ("dataset", "samples", "share", "tokens with loss")
RESULT_HEADERS = ("dataset", "samples", "share", "tokens", "loss before", "loss after")

Row = tuple[str, ...]


def plan_rows(plan: Plan) -> list[Row]:
    """(dataset, samples, share, tokens with loss) of each dataset of a mixture; none without a mixture."""
    return [
        (
            _one_line(one["name"]),
            units.count(one["rows"]),
            _share(one["share"]),
            units.count(one["tokens"]),
        )
        for one in plan.datasets
    ]


def result_rows(outcome: Outcome) -> list[Row]:
    """(dataset, samples, share, tokens, loss before, loss after) of each dataset of a mixture.

    A loss is empty where no row of the dataset was measured.
    """
    return [
        (
            _one_line(one.name),
            units.count(one.rows),
            _share(one.share),
            units.count(one.tokens),
            _loss(one.loss_before),
            _loss(one.loss_after),
        )
        for one in outcome.datasets
    ]


def _share(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def _loss(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.3f}"


def _one_line(name: str) -> str:
    """A name without control characters."""
    return "".join(char if char.isprintable() else " " for char in name)
