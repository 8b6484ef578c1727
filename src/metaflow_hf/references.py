"""References: the small JSON objects that users keep in ``self``, pass between flows, and load by.

On the wire a reference is a plain dict; the classes here are typed views of it. No token, credential or
machine path is ever part of one.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Self

from metaflow_hf.errors import SelectionError

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What every reference holds.

    ``key`` names the entry in the store below ``mf.hf/`` and is enough to load by; ``digest`` is the sha256 of
    the canonical manifest; ``size`` is in bytes, ``created_on`` in UTC (ISO 8601).
    """

    TYPE: ClassVar[str] = ""

    key: str
    digest: str
    size: int
    num_files: int
    created_on: str
    pathspec: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    def to_json(self) -> dict[str, Any]:
        """A plain dict with ``type``; the form in which references are passed on."""
        return {"type": self.TYPE, **asdict(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The typed view of a reference dict.

        Raises ``SelectionError`` when it is of another type, lacks a field, or was written by a newer version.
        """
        if value.get("type") != cls.TYPE:
            raise SelectionError(
                f"expected a reference of type {cls.TYPE!r}, got type {value.get('type')!r}."
            )
        if int(value.get("schema", SCHEMA)) > SCHEMA:
            raise SelectionError(
                f"the reference {value.get('key')!r} was written by a newer metaflow-hf (schema "
                f"{value['schema']}, this one reads up to {SCHEMA}): upgrade metaflow-hf."
            )
        known = {f.name for f in fields(cls)}
        try:
            return cls(**{name: item for name, item in value.items() if name in known})
        except TypeError as error:
            raise SelectionError(f"not a complete {cls.TYPE} reference: {error}.") from error


@dataclass(frozen=True, kw_only=True)
class SnapshotRef(Reference):
    """A cached snapshot of a hub repository at one commit."""

    TYPE: ClassVar[str] = "snapshot"

    repo_id: str
    repo_type: str
    revision: str
    commit_hash: str


@dataclass(frozen=True, kw_only=True)
class ModelRef(Reference):
    """A model saved by a task or exported by a training run."""

    TYPE: ClassVar[str] = "model"

    label: str = ""


@dataclass(frozen=True, kw_only=True)
class CheckpointRef(Reference):
    """A checkpoint saved by a task."""

    TYPE: ClassVar[str] = "checkpoint"

    name: str = "mfchckpt"
    version: int = 0


_TYPES: tuple[type[Reference], ...] = (SnapshotRef, ModelRef, CheckpointRef)


def parse_reference(value: Mapping[str, Any]) -> Reference:
    """The typed view of a reference dict of any type. Raises ``SelectionError`` for anything else."""
    for kind in _TYPES:
        if value.get("type") == kind.TYPE:
            return kind.from_json(value)
    raise SelectionError(
        f"not a reference: type {value.get('type')!r} is none of {', '.join(k.TYPE for k in _TYPES)}. Pass what "
        "snapshot_download, current.model.save or a training run returned."
    )
