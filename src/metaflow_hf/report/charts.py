"""Vega-Lite specs as plain dicts: the data inside, nothing to fetch, so that a card works offline.

Every chart is as wide as its container and quiet: light grid, no frame, direct units on the axes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from metaflow_hf.events import Evaluated
from metaflow_hf.report.series import RoundRow, StepPoint, TimePoint

Spec = dict[str, Any]

# Okabe and Ito's palette without yellow: distinguishable with any colour vision, on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195", "#555555")
_INK = "#333333"
WAITING = "#D9D9D9"
_HELD_OUT = "#7A1FA2"
_LOG_RATIO = 5.0  # losses that fall further than this are straight lines only on a log axis
_MAX_BARS = 100

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


def spec(height: int, **parts: Any) -> Spec:
    spec: Spec = {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "width": "container",
        "height": height,
        "autosize": {"type": "fit", "contains": "padding"},
        "config": _CONFIG,
    }
    return spec | parts


def data(rows: Sequence[Mapping[str, Any]]) -> Spec:
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


def tooltip(*fields: tuple[str, str, str]) -> list[Spec]:
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
    measured: Sequence[Evaluated] = (),
) -> Spec | None:
    """Training loss per worker over the tokens of the run, the rounds' loss, the held-out loss of the rounds that were
    measured, and named levels to compare with.

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
            "data": data(
                [{"worker": p.worker, "tokens": p.tokens, "loss": round(p.loss, 5)} for p in points]
            ),
            "mark": {"type": "line", "strokeWidth": 1.6, "opacity": 0.85, "interpolate": "monotone"},
            "encoding": {
                "x": x,
                "y": y,
                "color": _colour(workers),
                "tooltip": tooltip(
                    ("worker", "worker", ""), ("tokens", "tokens", ",d"), ("loss", "loss", ".3f")
                ),
            },
        }
    ]
    merged = [row for row in rounds if row.loss is not None and math.isfinite(row.loss) and row.tokens_total]
    if len(workers) > 1 and merged:
        layers.append(
            {
                "data": data(
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
                    "tooltip": tooltip(("round", "round", "d"), ("loss", "loss of the round", ".3f")),
                },
            }
        )
    layers += _held_out(measured, x, y)
    levels: list[Spec] = [
        {"name": name, "loss": level} for name, level in references.items() if math.isfinite(level)
    ]
    if levels:
        level_y = {"field": "loss", "type": "quantitative"}
        # A level is named where the curve is far from it.
        first, last = points[0].loss, points[-1].loss
        sides = [abs(level["loss"] - first) > abs(level["loss"] - last) for level in levels]
        layers += [
            {
                "data": data(levels),
                "mark": {"type": "rule", "strokeDash": [5, 4], "color": "#888888"},
                "encoding": {"y": level_y},
            },
            *(
                {
                    "data": data(
                        [level for level, left in zip(levels, sides, strict=True) if left is is_left]
                    ),
                    "mark": {
                        "type": "text",
                        "align": "left" if is_left else "right",
                        "dx": 6 if is_left else -6,
                        "dy": -7,
                        "color": "#666666",
                        "fontSize": 11,
                    },
                    "encoding": {
                        "y": level_y,
                        "x": {"value": 0 if is_left else "width"},
                        "text": {"field": "name"},
                    },
                }
                for is_left in set(sides)
            ),
        ]
    return spec(320, layer=layers)


def _held_out(measured: Sequence[Evaluated], x: Spec, y: Spec) -> list[Spec]:
    rows = [
        {"round": event.round, "tokens": event.tokens_total, "loss": round(event.loss, 5)}
        for event in measured
        if math.isfinite(event.loss)
    ]
    if not rows:
        return []
    return [
        {
            "data": data(rows),
            "mark": {
                "type": "line",
                "color": _HELD_OUT,
                "strokeWidth": 2,
                "point": {"shape": "diamond", "size": 70, "filled": True, "color": _HELD_OUT},
            },
            "encoding": {
                "x": x,
                "y": y,
                "tooltip": tooltip(("round", "round", "d"), ("loss", "held-out loss", ".3f")),
            },
        }
    ]


def learning_rate_chart(points: Sequence[StepPoint], workers: Sequence[str]) -> Spec | None:
    """The learning rate over the tokens of the run; None without points."""
    if not points:
        return None
    rows = [
        {"worker": p.worker, "tokens": p.tokens, "rate": float(f"{p.learning_rate:.4g}")}
        for p in points
        if math.isfinite(p.learning_rate)
    ]
    return spec(
        140,
        data=data(rows),
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
    return spec(
        190,
        data=data(rows),
        mark={"type": "area", "opacity": 0.75, "interpolate": "step"},
        encoding={
            "x": _axis("minutes", "minutes", scale={"nice": False}),
            "y": {**_axis("rate", "tokens per second", format="~s", tickCount=4), "stack": "zero"},
            "color": _colour(workers),
            "tooltip": tooltip(("worker", "worker", ""), ("rate", "tokens per second", ",.0f")),
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
    return spec(
        140,
        data=data(rows),
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
    return spec(
        height,
        data=data(rows),
        mark={"type": "rect", "opacity": 0.9},
        encoding={
            "x": _axis("left", "round", scale={"zero": False, "nice": False}, format="d"),
            "x2": {"field": "right"},
            "y": _axis("low", title, format=axis, tickCount=4),
            "y2": {"field": "high"},
            "color": colour,
            "tooltip": tooltip(("rounds", "round", ""), ("worker", "", ""), ("value", title, form)),
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
    scale = {"domain": ["working", "waiting"], "range": [PALETTE[0], WAITING]}
    colour = {"field": "worker", "type": "nominal", "scale": scale}
    return _bars(rows, "seconds", 160, colour, "~r", ".2f")
