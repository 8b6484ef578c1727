"""Long sequences on one device: loss and exact gradients, token chunk by token chunk.

Importing this package costs nothing; torch and transformers load with the first name used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metaflow_hf.rollout.probe import probe_model
    from metaflow_hf.rollout.rollout import chunked_segment_rollout
    from metaflow_hf.rollout.trial import RolloutReport

__all__ = ["RolloutReport", "chunked_segment_rollout", "probe_model"]

_MODULES = {"RolloutReport": "trial", "chunked_segment_rollout": "rollout", "probe_model": "probe"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
