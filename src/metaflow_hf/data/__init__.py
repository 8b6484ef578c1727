"""Rows -> blocks -> chunks -> batches, each row trained exactly once whatever is killed.

Importing this package costs nothing; what is heavy loads with the first name used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metaflow_hf.data.build import build_blocks, process_raw_dataset_to_blocks
    from metaflow_hf.data.formats import DetectedFormat, detect_format, register_format
    from metaflow_hf.data.ledger import Claim
    from metaflow_hf.data.manager import Block, BlockManager
    from metaflow_hf.data.manifest import BlockManifest
    from metaflow_hf.data.order import Chunk, chunk_order
    from metaflow_hf.data.source_rows import open_rows
    from metaflow_hf.data.streaming import StreamingBlockWriter
    from metaflow_hf.data.tokens import EncodedExample, encode_examples
    from metaflow_hf.data.tracker import ChunkTracker
    from metaflow_hf.data.verify import verify_blocks

__all__ = [
    "Block",
    "BlockManager",
    "BlockManifest",
    "Chunk",
    "ChunkTracker",
    "Claim",
    "DetectedFormat",
    "EncodedExample",
    "StreamingBlockWriter",
    "build_blocks",
    "chunk_order",
    "detect_format",
    "encode_examples",
    "open_rows",
    "process_raw_dataset_to_blocks",
    "register_format",
    "verify_blocks",
]

_MODULES = {
    "Block": "manager",
    "BlockManager": "manager",
    "BlockManifest": "manifest",
    "Chunk": "order",
    "ChunkTracker": "tracker",
    "Claim": "ledger",
    "DetectedFormat": "formats",
    "EncodedExample": "tokens",
    "StreamingBlockWriter": "streaming",
    "build_blocks": "build",
    "chunk_order": "order",
    "detect_format": "formats",
    "encode_examples": "tokens",
    "open_rows": "source_rows",
    "process_raw_dataset_to_blocks": "build",
    "register_format": "formats",
    "verify_blocks": "verify",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
