"""From events to what people read: lines in logs, ``metrics.jsonl``, plan and summary, the card, trackers.

Nothing here trains, stores or imports a framework: listeners take events (``metaflow_hf.events``), pure
functions turn lists of them into text, tables and charts.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metaflow_hf.report.baselines import UnigramModel, xz_bits_per_byte
    from metaflow_hf.report.card import training_page
    from metaflow_hf.report.comparing import Compared, best_first, comparison_page, comparison_text
    from metaflow_hf.report.listeners import fan_out
    from metaflow_hf.report.live import LivePage
    from metaflow_hf.report.metrics import MetricsFile, merge_events, parse_events, read_events
    from metaflow_hf.report.outcome import Outcome, Plan, WorstRow
    from metaflow_hf.report.progress import ProgressLines
    from metaflow_hf.report.text import plan_text, ruled, summary_text
    from metaflow_hf.report.trackers import open_tracker

_MODULES = {
    "Compared": "comparing",
    "LivePage": "live",
    "MetricsFile": "metrics",
    "Outcome": "outcome",
    "Plan": "outcome",
    "ProgressLines": "progress",
    "UnigramModel": "baselines",
    "WorstRow": "outcome",
    "best_first": "comparing",
    "comparison_page": "comparing",
    "comparison_text": "comparing",
    "fan_out": "listeners",
    "merge_events": "metrics",
    "open_tracker": "trackers",
    "parse_events": "metrics",
    "plan_text": "text",
    "read_events": "metrics",
    "ruled": "text",
    "summary_text": "text",
    "training_page": "card",
    "xz_bits_per_byte": "baselines",
}

__all__ = [
    "Compared",
    "LivePage",
    "MetricsFile",
    "Outcome",
    "Plan",
    "ProgressLines",
    "UnigramModel",
    "WorstRow",
    "best_first",
    "comparison_page",
    "comparison_text",
    "fan_out",
    "merge_events",
    "open_tracker",
    "parse_events",
    "plan_text",
    "read_events",
    "ruled",
    "summary_text",
    "training_page",
    "xz_bits_per_byte",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"metaflow_hf.report.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
