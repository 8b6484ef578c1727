"""The embedded default: a tiny model, a small text dataset, and a hub on localhost that serves them.

Read in this order: `commits` and `content` (what a hub holds), `protocol` and `routes` (requests to answers),
`listing`, `files` and `push` (the answers), `server` (sockets), `faults` and `requestlog` (for tests),
`corpus`, `tiny_models` and `tiny_tokenizers` (what is served), `catalog` (under which names), `embedded` (one server per
process). `metaflow_hf_cli.fixtures` has more to serve, for tests.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metaflow_hf.demo.catalog import DATASET_ID, MODEL_ID, demo_content
    from metaflow_hf.demo.content import HubContent
    from metaflow_hf.demo.embedded import ensure_running
    from metaflow_hf.demo.server import HubServer

_HOME = {
    "DATASET_ID": "catalog",
    "MODEL_ID": "catalog",
    "demo_content": "catalog",
    "HubContent": "content",
    "ensure_running": "embedded",
    "HubServer": "server",
}
__all__ = [
    "DATASET_ID",
    "MODEL_ID",
    "HubContent",
    "HubServer",
    "demo_content",
    "ensure_running",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
