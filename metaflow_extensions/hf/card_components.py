"""A report's page as Metaflow card components: the only place that knows both.

Use in a step with ``@card(type="blank")``::

    from metaflow_extensions.hf.card_components import show

    show(current.card, training_page(plan, events, outcome))
"""

from pathlib import Path
from typing import Any

from metaflow import Task
from metaflow.cards import Markdown, VegaChart, get_cards
from metaflow.exception import MetaflowNotFound
from metaflow.plugins.cards.card_datastore import CardDatastore

from metaflow_hf.report.page import Page, document


def components(page: Page) -> list[Any]:
    """The page's blocks in order: HTML that is already escaped goes as Markdown, specs as Vega charts.

    The chart code is part of the card, so the card shows everything offline.
    """
    return [VegaChart(part) if isinstance(part, dict) else Markdown(part) for part in document(page)]


def show(card: Any, page: Page) -> None:
    """Replaces what ``card`` (``current.card``) shows by this page, also in a card that is being watched."""
    card.clear()
    card.extend(components(page))
    card.refresh()


def card_path(pathspec: str, card_id: str) -> str:
    """Where the card of a finished task is stored: a file path or a cloud URI; "" when it is not found."""
    try:
        # The task is named in full: whose namespace it is in does not matter.
        task = Task(pathspec, _namespace_check=False)
    except MetaflowNotFound:
        # Without a metadata service, a task on another machine is not known here.
        return ""
    facts = task.metadata_dict
    root = CardDatastore.get_storage_root(facts["ds-type"])
    if facts["ds-type"] != "local":
        cards = get_cards(task, id=card_id)
        return f"{root}/{cards[0].path}" if len(cards) else ""
    # Metaflow looks for local cards beside the datastore, but writes them below the current directory (or, with
    # METAFLOW_CARD_LOCALROOT, beside the flow's data).
    flow, run, step, number = pathspec.split("/")
    below = f"{flow}/runs/{run}/steps/{step}/tasks/{number}/cards/*-{card_id}-*.html"
    found = [path for place in (root, facts["ds-root"]) if place for path in Path(place).glob(below)]
    return str(found[0]) if found else ""
