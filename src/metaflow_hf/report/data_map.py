"""The order of the data as a map: what is in the model, what waits for its round, what is left."""

import math
from collections.abc import Mapping
from collections.abc import Set as AbstractSet

from metaflow_hf.report.charts import WAITING, Spec, data, spec, tooltip

_CLAIMED = "#E69F00"
_MAX_CELLS = 2400


def positions_per_cell(positions_total: int) -> int:
    """How many neighbouring positions share a cell of ``position_chart``."""
    return max(1, math.ceil(positions_total / _MAX_CELLS))


def position_chart(
    done: Mapping[int, tuple[int, str]],
    claimed: AbstractSet[int],
    positions_total: int,
    labels: Mapping[str, str],
) -> Spec | None:
    """The order of the data as cells, row by row: the colour is the round that trained them, orange waits for its round
    to close, grey is left.

    One cell a position, or a group of neighbours when there are more than 2,400; a group's colour is its last
    round, and it is grey until all of it is done, or orange where somebody is at it. None when there is no position.
    """
    if positions_total <= 0:
        return None
    size = positions_per_cell(positions_total)
    cells = math.ceil(positions_total / size)
    columns = max(1, min(cells, math.ceil(math.sqrt(cells * 7))))
    rows = []
    for cell in range(cells):
        members = range(cell * size, min((cell + 1) * size, positions_total))
        facts = [done[position] for position in members if position in done]
        is_done = len(facts) == len(members)
        rows.append(
            {
                "column": cell % columns,
                "row": cell // columns,
                "round": max(fact[0] for fact in facts) if is_done else None,
                "claimed": any(position in claimed for position in members),
                "position": str(members[0]) if size == 1 else f"{members[0]}-{members[-1]}",
                "worker": ", ".join(sorted({labels.get(fact[1], fact[1]) for fact in facts})) or "nobody yet",
            }
        )
    lines = math.ceil(cells / columns)
    place: Spec = {
        channel: {"field": field, "type": "ordinal", "axis": None, "scale": {"domain": list(range(number))}}
        for channel, field, number in (("x", "column", columns), ("y", "row", lines))
    }
    facts_shown = tooltip(("position", "position", ""), ("round", "round", ""), ("worker", "worker", ""))
    colour: Spec = {
        "field": "round",
        "type": "quantitative",
        "scale": {"scheme": "viridis", "reverse": True},
        "legend": {"title": "round", "orient": "right", "gradientLength": 90, "format": "d"},
    }
    # Vega-Lite drops what has no round, so grey is a layer of its own and no condition on the colour.
    layers: list[Spec] = [
        {
            "data": data(group),
            "mark": {"type": "rect", "stroke": "white", "strokeWidth": 0.6},
            "encoding": {**place, "color": shade, "tooltip": facts_shown},
        }
        for group, shade in (
            ([row for row in rows if row["round"] is None and not row["claimed"]], {"value": WAITING}),
            ([row for row in rows if row["round"] is None and row["claimed"]], {"value": _CLAIMED}),
            ([row for row in rows if row["round"] is not None], colour),
        )
        if group
    ]
    return spec(max(40, lines * max(7, min(14, 220 // lines))), layer=layers)
