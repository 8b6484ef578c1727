"""Every error that metaflow-hf raises on purpose.

MetaflowHFError
├── user errors (also ValueError): something that the caller can mend
│   ├── ConfigError               a key or value of the configuration
│   ├── SelectionError            a repo id, revision, pattern or path that selects nothing or too much
│   │   └── FormatError           rows whose format, or whose columns, are not certain (also ConfigError)
│   ├── UnsupportedModelError     a model that cannot be trained or rolled out correctly
│   ├── UnsupportedModalityError  a dataset that is not text
│   ├── BadRowError               a row that cannot be stored or has no usable text
│   └── DatasetMismatch           a directory holds another dataset, or the source changed
├── HubError: what the hub answered, or did not
│   ├── RepositoryNotFoundError   \
│   ├── RevisionNotFoundError      | also huggingface_hub's classes of the same name
│   ├── EntryNotFoundError         | (combined in ``metaflow_hf.hub``)
│   ├── GatedRepoError            /
│   └── HubUnavailable            no answer after bounded retries, or offline (also ConnectionError)
├── StoreError: what the object store answered, or did not
│   ├── StoreUnavailable          no answer after bounded retries, not permitted, disk full
│   ├── IntegrityError            stored bytes differ from their checksum
│   │   └── ContentLost           a manifest's bytes are gone (also NotFound)
│   ├── NotFound                  no object has this key
│   ├── AlreadyExists             the key is taken by other bytes
│   └── UnsupportedStore          the store cannot create atomically, or its scheme is unknown
├── ClaimLost                     another worker holds, or finished, what this one claimed
└── TrainingError
    ├── LineageMismatch           the lineage was started with another configuration
    ├── TrainingIncomplete        the lineage has no final round, or a position fails again and again
    └── NonFiniteLoss             the loss became NaN or infinite

A message says what happened, where, and what to do. Missing, empty and failed are different types.
"""


class MetaflowHFError(Exception):
    """Base of all errors raised by metaflow-hf."""


class UserError(MetaflowHFError, ValueError):
    """Something that the caller can mend; base of the user errors."""


class ConfigError(UserError):
    """A configuration has a wrong key or value; the message lists all of them with their paths."""


class SelectionError(UserError):
    """A repo id, revision, pattern or path selects nothing, too much, or is malformed."""


class FormatError(SelectionError, ConfigError):
    """The format of a dataset's rows is not certain; the message names the columns and the settings that decide."""


class UnsupportedModelError(UserError):
    """The model cannot be trained or rolled out correctly; the message names the reason."""


class UnsupportedModalityError(UserError):
    """The dataset's modality cannot be trained on."""


class BadRowError(UserError):
    """A row cannot be stored, or has no usable text; the message names row and column, ``row`` its index."""

    def __init__(self, message: str = "", *, row: int | None = None) -> None:
        super().__init__(message)
        self.row = row


class DatasetMismatch(UserError):  # noqa: N818  the name is public
    """The directory holds another dataset, or its source changed since it was begun."""


class HubError(MetaflowHFError):
    """Base of what the hub answered, or did not."""


class RepositoryNotFoundError(HubError):
    """The repository does not exist on this hub, or this user may not see it."""


class RevisionNotFoundError(HubError):
    """The repository has no such branch, tag or commit."""


class EntryNotFoundError(HubError):
    """The revision has no such file."""


class GatedRepoError(HubError):
    """The repository is gated and this user was not granted access."""


class HubUnavailable(HubError, ConnectionError):  # noqa: N818  the name is public
    """The hub gave no usable answer after bounded retries, or offline mode forbids asking."""


class StoreError(MetaflowHFError):
    """Base of what the object store answered, or did not."""


class StoreUnavailable(StoreError, ConnectionError):  # noqa: N818  the name is public
    """The store gave no usable answer after bounded retries, refused access, or is full."""


class IntegrityError(StoreError):
    """Stored bytes differ from their size or checksum."""


class NotFound(StoreError, LookupError):  # noqa: N818  the name is public
    """No object has this key."""


class ContentLost(IntegrityError, NotFound):  # noqa: N818  reads as what it says
    """The bytes of a file are gone although the manifest that names them is there."""


class AlreadyExists(StoreError):  # noqa: N818  the name is public
    """The key is taken by other bytes."""


class UnsupportedStore(StoreError, ValueError):  # noqa: N818  the name is public
    """The store cannot create objects atomically, or its scheme is unknown."""


class ClaimLost(MetaflowHFError):  # noqa: N818  the name is public
    """Another worker holds, or has finished, what this one had claimed."""


class TrainingError(MetaflowHFError):
    """Base of what ends a training run."""


class LineageMismatch(TrainingError, ValueError):  # noqa: N818  the name is public
    """The lineage was started with another configuration; the message shows the difference."""


class TrainingIncomplete(TrainingError):  # noqa: N818  the name is public
    """The lineage is not final, or a position failed more often than allowed."""


class NonFiniteLoss(TrainingError, ArithmeticError):  # noqa: N818  the name is public
    """The loss became NaN or infinite; the message names step and position."""


__all__ = [
    "AlreadyExists",
    "BadRowError",
    "ClaimLost",
    "ConfigError",
    "ContentLost",
    "DatasetMismatch",
    "EntryNotFoundError",
    "GatedRepoError",
    "HubError",
    "HubUnavailable",
    "IntegrityError",
    "LineageMismatch",
    "MetaflowHFError",
    "NonFiniteLoss",
    "NotFound",
    "RepositoryNotFoundError",
    "RevisionNotFoundError",
    "SelectionError",
    "StoreError",
    "StoreUnavailable",
    "TrainingError",
    "TrainingIncomplete",
    "UnsupportedModalityError",
    "UnsupportedModelError",
    "UnsupportedStore",
    "UserError",
]
