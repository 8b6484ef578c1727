"""Vega-Lite specs as plain dicts: the data inside, nothing to fetch, so that a card works offline.

Every chart is as wide as its container and quiet: light grid, no frame, direct units on the axes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from metaflow_hf.report.series import RoundRow, StepPoint, TimePoint

Spec = dict[str, Any]

# Okabe and Ito's palette without yellow: distinguishable with any colour vision, on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195", "#555555")
_INK = "#333333"
_WAITING = "#D9D9D9"
_LOG_RATIO = 5.0  # losses that fall further than this are straight lines only on a log axis
_MAX_BARS = 100
_MAX_CELLS = 2400

_CONFIG: Spec = {
    "font": "Roboto, Helvetica, Arial, sans-serif",
    "background": "transparent",
    "view": {"stroke": None},
    "axis": {
        "gridColor": "#ECECEC",
        "domainColor": "#BBBBBB",
        "tickColor": "#BBBBBB",
        "labelColor": "#666666",
        "titleColor": "#666666",
        "titleFontWeight": "normal",
        "labelFontSize": 11,
        "titleFontSize": 11,
    },
    "legend": {"orient": "top", "title": None, "labelFontSize": 12, "labelColor": _INK, "labelLimit": 240},
}


def _spec(height: int, **parts: Any) -> Spec:
    spec: Spec = {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "width": "container",
        "height": height,
        "autosize": {"type": "fit", "contains": "padding"},
        "config": _CONFIG,
    }
    return spec | parts


def _data(rows: Sequence[Mapping[str, Any]]) -> Spec:
    return {"values": [dict(row) for row in rows]}


def _axis(field: str, title: str, **options: Any) -> Spec:
    given: Spec = {key: options.pop(key) for key in ("format", "tickCount") if key in options}
    axis: Spec = {"title": title, "tickCount": 8, "labelOverlap": "greedy", "labelSeparation": 6}
    axis |= given
    return {"field": field, "type": "quantitative", "axis": axis, **options}


def _colour(names: Sequence[str]) -> Spec:
    scale = {"domain": list(names), "range": [PALETTE[i % len(PALETTE)] for i in range(len(names))]}
    colour: Spec = {"field": "worker", "type": "nominal", "scale": scale}
    return colour | ({"legend": None} if len(names) == 1 else {})


def _tooltip(*fields: tuple[str, str, str]) -> list[Spec]:
    return [
        {"field": field, "title": title, "type": "quantitative" if form else "nominal"}
        | ({"format": form} if form else {})
        for field, title, form in fields
    ]


def loss_chart(
    points: Sequence[StepPoint],
    workers: Sequence[str],
    rounds: Sequence[RoundRow],
    references: Mapping[str, float],
) -> Spec | None:
    """Training loss per worker over the tokens of the run, the rounds' loss, and named levels to compare with.

    The loss axis is logarithmic when the loss falls more than fivefold. None without points.
    """
    if not points:
        return None
    losses = [point.loss for point in points]
    is_log = min(losses) > 0 and max(losses) / min(losses) > _LOG_RATIO
    scale = {"type": "log", "nice": False} if is_log else {"zero": False}
    x = _axis("tokens", "tokens trained", format="~s", scale={"zero": False, "nice": False})
    y = _axis("loss", f"loss (nats per token{', log' if is_log else ''})", scale=scale)
    layers: list[Spec] = [
        {
            "data": _data(
                [{"worker": p.worker, "tokens": p.tokens, "loss": round(p.loss, 5)} for p in points]
            ),
            "mark": {"type": "line", "strokeWidth": 1.6, "opacity": 0.85, "interpolate": "monotone"},
            "encoding": {
                "x": x,
                "y": y,
                "color": _colour(workers),
                "tooltip": _tooltip(
                    ("worker", "worker", ""), ("tokens", "tokens", ",d"), ("loss", "loss", ".3f")
                ),
            },
        }
    ]
    merged = [row for row in rounds if row.loss is not None and math.isfinite(row.loss) and row.tokens_total]
    if len(workers) > 1 and merged:
        layers.append(
            {
                "data": _data(
                    [
                        # The mean of a round belongs to its middle.
                        {"round": r.round, "tokens": r.tokens_total - r.tokens // 2, "loss": r.loss}
                        for r in merged
                    ]
                ),
                "mark": {"type": "point", "filled": True, "size": 18, "color": _INK, "opacity": 0.8},
                "encoding": {
                    "x": x,
                    "y": y,
                    "tooltip": _tooltip(("round", "round", "d"), ("loss", "loss of the round", ".3f")),
                },
            }
        )
    levels = [{"name": name, "loss": level} for name, level in references.items() if math.isfinite(level)]
    if levels:
        level_y = {"field": "loss", "type": "quantitative"}
        layers += [
            {
                "data": _data(levels),
                "mark": {"type": "rule", "strokeDash": [5, 4], "color": "#888888"},
                "encoding": {"y": level_y},
            },
            {
                "data": _data(levels),
                "mark": {
                    "type": "text",
                    "align": "right",
                    "dx": -4,
                    "dy": -6,
                    "color": "#666666",
                    "fontSize": 11,
                },
                "encoding": {"y": level_y, "x": {"value": "width"}, "text": {"field": "name"}},
            },
        ]
    return _spec(320, layer=layers)


def learning_rate_chart(points: Sequence[StepPoint], workers: Sequence[str]) -> Spec | None:
    """The learning rate over the tokens of the run; None without points."""
    if not points:
        return None
    rows = [
        {"worker": p.worker, "tokens": p.tokens, "rate": float(f"{p.learning_rate:.4g}")}
        for p in points
        if math.isfinite(p.learning_rate)
    ]
    return _spec(
        140,
        data=_data(rows),
        mark={"type": "line", "strokeWidth": 1.6, "interpolate": "monotone"},
        encoding={
            "x": _axis("tokens", "tokens trained", format="~s", scale={"zero": False, "nice": False}),
            "y": _axis("rate", "learning rate", format=".1e", tickCount=3),
            "color": {**_colour(workers), "legend": None},
        },
    )


def throughput_chart(points: Sequence[TimePoint], workers: Sequence[str]) -> Spec | None:
    """Tokens per second of all workers together, stacked, over the minutes of the run; None without points."""
    if not points:
        return None
    rows = [
        {"worker": p.worker, "minutes": round(p.minutes, 3), "rate": round(p.tokens_per_second, 1)}
        for p in points
    ]
    return _spec(
        190,
        data=_data(rows),
        mark={"type": "area", "opacity": 0.75, "interpolate": "step"},
        encoding={
            "x": _axis("minutes", "minutes", scale={"nice": False}),
            "y": {**_axis("rate", "tokens per second", format="~s", tickCount=4), "stack": "zero"},
            "color": _colour(workers),
            "tooltip": _tooltip(("worker", "worker", ""), ("rate", "tokens per second", ",.0f")),
        },
    )


def memory_chart(points: Sequence[TimePoint], workers: Sequence[str]) -> Spec | None:
    """Peak memory of each worker in GiB over the minutes of the run; None when nobody measured it."""
    rows = [
        {"worker": p.worker, "minutes": round(p.minutes, 3), "gib": round(p.memory_bytes / 2**30, 3)}
        for p in points
        if p.memory_bytes
    ]
    if not rows:
        return None
    return _spec(
        140,
        data=_data(rows),
        mark={"type": "line", "strokeWidth": 1.6, "interpolate": "step"},
        encoding={
            "x": _axis("minutes", "minutes", scale={"nice": False}),
            "y": _axis("gib", "memory (GiB)", tickCount=3),
            "color": {**_colour(workers), "legend": None},
        },
    )


def _grouped(rounds: Sequence[RoundRow]) -> list[list[RoundRow]]:
    size = math.ceil(len(rounds) / _MAX_BARS)
    return [list(rounds[start : start + size]) for start in range(0, len(rounds), size)] if rounds else []


def _stacked(group: Sequence[RoundRow], parts: Mapping[str, float], unit: str) -> list[Spec]:
    first, last = group[0].round, group[-1].round
    label = str(first) if first == last else f"{first}-{last}"
    bars, floor = [], 0.0
    for name, value in parts.items():
        bars.append(
            {"worker": name, "left": first - 0.42, "right": last + 0.42, "low": floor, "high": floor + value}
            | {"value": value, "rounds": label, "unit": unit}
        )
        floor += value
    return bars


def _bars(rows: Sequence[Spec], title: str, height: int, colour: Spec, axis: str, form: str) -> Spec:
    return _spec(
        height,
        data=_data(rows),
        mark={"type": "rect", "opacity": 0.9},
        encoding={
            "x": _axis("left", "round", scale={"zero": False, "nice": False}, format="d"),
            "x2": {"field": "right"},
            "y": _axis("low", title, format=axis, tickCount=4),
            "y2": {"field": "high"},
            "color": colour,
            "tooltip": _tooltip(("rounds", "round", ""), ("worker", "", ""), ("value", title, form)),
        },
    )


def round_tokens_chart(rounds: Sequence[RoundRow], workers: Sequence[str]) -> Spec | None:
    """Tokens that each worker contributed to each round, stacked (summed over groups of rounds in long runs)."""
    rows = []
    for group in _grouped(rounds):
        parts = {name: float(sum(row.tokens_by_worker.get(name, 0) for row in group)) for name in workers}
        rows += _stacked(group, {name: value for name, value in parts.items() if value}, "tokens")
    if not rows:
        return None
    return _bars(rows, "tokens", 190, _colour(workers), "~s", ",.0f")


def round_seconds_chart(rounds: Sequence[RoundRow]) -> Spec | None:
    """Seconds of each round: work, and waiting for the others (means over groups of rounds in long runs)."""
    rows = []
    for group in _grouped(rounds):
        waited = sum(row.waited_seconds for row in group) / len(group)
        total = max(sum(row.seconds for row in group) / len(group), waited)
        if total > 0:
            parts = {"working": round(total - waited, 3), "waiting": round(waited, 3)}
            rows += _stacked(group, parts, "seconds")
    if not rows:
        return None
    scale = {"domain": ["working", "waiting"], "range": [PALETTE[0], _WAITING]}
    colour = {"field": "worker", "type": "nominal", "scale": scale}
    return _bars(rows, "seconds", 160, colour, "~g", ".2f")


def positions_per_cell(positions_total: int) -> int:
    """How many neighbouring positions share a cell of ``position_chart``."""
    return max(1, math.ceil(positions_total / _MAX_CELLS))


def position_chart(
    done: Mapping[int, tuple[int, str]], positions_total: int, labels: Mapping[str, str]
) -> Spec | None:
    """The order of the data as cells, row by row: the colour is the round that trained them, grey is left.

    One cell a position, or a group of neighbours when there are more than 2,400; a group's colour is its last
    round, and it is grey until all of it is done. None when there is no position.
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
                "position": str(members[0]) if size == 1 else f"{members[0]}-{members[-1]}",
                "worker": ", ".join(sorted({labels.get(fact[1], fact[1]) for fact in facts})) or "nobody yet",
            }
        )
    lines = math.ceil(cells / columns)
    place: Spec = {
        channel: {"field": field, "type": "ordinal", "axis": None, "scale": {"domain": list(range(number))}}
        for channel, field, number in (("x", "column", columns), ("y", "row", lines))
    }
    facts_shown = _tooltip(("position", "position", ""), ("round", "round", ""), ("worker", "worker", ""))
    colour: Spec = {
        "field": "round",
        "type": "quantitative",
        "scale": {"scheme": "viridis", "reverse": True},
        "legend": {"title": "round", "orient": "right", "gradientLength": 90, "format": "d"},
    }
    # Vega-Lite drops what has no round, so grey is a layer of its own and no condition on the colour.
    layers: list[Spec] = [
        {
            "data": _data(group),
            "mark": {"type": "rect", "stroke": "white", "strokeWidth": 0.6},
            "encoding": {**place, "color": shade, "tooltip": facts_shown},
        }
        for group, shade in (
            ([row for row in rows if row["round"] is None], {"value": _WAITING}),
            ([row for row in rows if row["round"] is not None], colour),
        )
        if group
    ]
    return _spec(max(40, lines * max(7, min(14, 220 // lines))), layer=layers)
