"""Many workers, one model, nothing but a store between them. Read the modules in this order:

    ranges       sets of positions
    records      what is stored: specification, rounds, contributions
    lineage      the keys, and reading them
    spec         what a lineage trains, and which configurations may join it
    tensors, delta, outer    files of tensors; what a contribution consists of; how contributions become one step
    judging, merge, ema      which contributions count; closing a round; the moving average
    ledger       claims within a round
    heartbeat    who is still at work
    trainer      a claim -> optimiser steps
    contribution, closing    publishing; waiting and merging
    worker       the loop; assembly puts one together
    running      from a configuration to a lineage and its workers
    export, evaluation, generation    what comes of it

Importing this package costs nothing; torch and the rest load with the first name used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metaflow_hf.train.evaluation import evaluate
    from metaflow_hf.train.export import export_lineage
    from metaflow_hf.train.generation import generate
    from metaflow_hf.train.ledger import RoundsLedger
    from metaflow_hf.train.running import start_lineage, train_worker

__all__ = ["RoundsLedger", "evaluate", "export_lineage", "generate", "start_lineage", "train_worker"]

_MODULES = {
    "RoundsLedger": "ledger",
    "evaluate": "evaluation",
    "export_lineage": "export",
    "generate": "generation",
    "start_lineage": "running",
    "train_worker": "running",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
