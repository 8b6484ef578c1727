"""Rows -> blocks -> chunks -> batches, each row trained exactly once whatever is killed.

Importing this package costs nothing; what is heavy loads with the first name used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metaflow_hf.data.build import build_blocks, process_raw_dataset_to_blocks
    from metaflow_hf.data.ledger import Claim
    from metaflow_hf.data.manager import Block, BlockManager
    from metaflow_hf.data.manifest import BlockManifest
    from metaflow_hf.data.order import Chunk, chunk_order
    from metaflow_hf.data.source_rows import open_rows
    from metaflow_hf.data.streaming import StreamingBlockWriter
    from metaflow_hf.data.tracker import ChunkTracker
    from metaflow_hf.data.verify import verify_blocks

__all__ = [
    "Block",
    "BlockManager",
    "BlockManifest",
    "Chunk",
    "ChunkTracker",
    "Claim",
    "StreamingBlockWriter",
    "build_blocks",
    "chunk_order",
    "open_rows",
    "process_raw_dataset_to_blocks",
    "verify_blocks",
]

_MODULES = {
    "Block": "manager",
    "BlockManager": "manager",
    "BlockManifest": "manifest",
    "Chunk": "order",
    "ChunkTracker": "tracker",
    "Claim": "ledger",
    "StreamingBlockWriter": "streaming",
    "build_blocks": "build",
    "chunk_order": "order",
    "open_rows": "source_rows",
    "process_raw_dataset_to_blocks": "build",
    "verify_blocks": "verify",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
