"""Peak memory over the length of the sequence, one line a mode. Needs matplotlib (`pip install matplotlib`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw(rows: list[dict[str, Any]], path: Path, *, unit: str, title: str) -> None:
    """Rows with `mode`, `length` and `peak` (None: out of memory), both axes logarithmic."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "memory"  # the same figures give the same file
    figure, axes = plt.subplots(figsize=(8.5, 4.2), layout="constrained")
    for mode in dict.fromkeys(row["mode"] for row in rows):
        points = sorted((r["length"], r["peak"]) for r in rows if r["mode"] == mode and r["peak"] is not None)
        ours = mode.startswith(("exact", "truncated"))
        axes.plot(
            *zip(*points, strict=True), "o-" if ours else "s--", label=mode, linewidth=2 if ours else 1.2
        )
    axes.set(xlabel="tokens in the sequence", ylabel=f"{unit} above weights and gradients", title=title)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{int(value):,}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(visible=True, alpha=0.3)
    figure.legend(loc="outside right upper")
    figure.savefig(path, metadata={"Date": None})
