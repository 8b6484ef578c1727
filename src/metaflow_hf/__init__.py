"""Hugging Face models and datasets on Metaflow.

Importing this package costs nothing but the standard library. The public names of the parts are in
``metaflow_hf.hub``, ``.data``, ``.rollout`` and ``.train``; the decorators come from ``metaflow`` itself.
"""

from metaflow_hf._version import __version__
from metaflow_hf.errors import (
    AlreadyExists,
    BadRowError,
    ClaimLost,
    ConfigError,
    DatasetMismatch,
    EntryNotFoundError,
    GatedRepoError,
    HubError,
    HubUnavailable,
    IntegrityError,
    LineageMismatch,
    MetaflowHFError,
    NonFiniteLoss,
    NotFound,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SelectionError,
    StoreError,
    StoreUnavailable,
    TrainingError,
    TrainingIncomplete,
    UnsupportedModalityError,
    UnsupportedModelError,
    UnsupportedStore,
    UserError,
)
from metaflow_hf.references import CheckpointRef, ModelRef, SnapshotRef

# Metaflow packages what says so with every remote task.
METAFLOW_PACKAGE_POLICY = "include"

__all__ = [
    "AlreadyExists",
    "BadRowError",
    "CheckpointRef",
    "ClaimLost",
    "ConfigError",
    "DatasetMismatch",
    "EntryNotFoundError",
    "GatedRepoError",
    "HubError",
    "HubUnavailable",
    "IntegrityError",
    "LineageMismatch",
    "MetaflowHFError",
    "ModelRef",
    "NonFiniteLoss",
    "NotFound",
    "RepositoryNotFoundError",
    "RevisionNotFoundError",
    "SelectionError",
    "SnapshotRef",
    "StoreError",
    "StoreUnavailable",
    "TrainingError",
    "TrainingIncomplete",
    "UnsupportedModalityError",
    "UnsupportedModelError",
    "UnsupportedStore",
    "UserError",
    "__version__",
]
