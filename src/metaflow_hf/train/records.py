"""What a lineage keeps in the store: small immutable JSON objects that anybody can read.

A record's digest is the sha256 of its bytes; positions are half-open ranges ``[start, stop)``. Fields are only
ever added, so that an older reader still understands a newer lineage of the same schema.
"""

import hashlib
from collections.abc import Mapping
from typing import Any, Final, Literal, TypeVar

import msgspec

from metaflow_hf.errors import IntegrityError, LineageMismatch
from metaflow_hf.store.objects import Digest
from metaflow_hf.train.ranges import Positions, Range

SCHEMA: Final = 1

Encoding = Literal["weights", "fp32", "int8/1024"]


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all records."""

    def encode(self) -> bytes:
        """The JSON bytes that are stored; equal records give equal bytes."""
        return msgspec.json.encode(self)


class Payload(Record, frozen=True, kw_only=True):
    """One stored safetensors file: its key below the lineage, sha256 and size in bytes."""

    key: str
    digest: str
    size: int

    @property
    def expected(self) -> Digest:
        """What a download of it must be."""
        return Digest(sha256=self.digest, size=self.size)


class Spec(Record, frozen=True, kw_only=True):
    """What a lineage trains. Created once; ``config_digest`` covers only what changes the mathematics.

    ``sources`` says where model and data came from, with the commits that their revisions named then; ``datasets``
    (name, dataset, commit, key, digest) those of a mixture, and is not there for a single dataset.
    """

    lineage: str
    dataset: dict[str, str]
    order: dict[str, Any]
    num_positions: int
    max_tokens: int | None
    hyperparameters: dict[str, Any]
    config_digest: str
    initial_weights: Payload
    sources: dict[str, str] = {}
    datasets: list[dict[str, str]] | msgspec.UnsetType = msgspec.UNSET
    schema: int = SCHEMA


class Accepted(Record, frozen=True, kw_only=True):
    """One contribution that is in the weights of a round; ``loss`` is its mean in nats per token."""

    attempt: str
    positions: list[Range]
    tokens: int
    loss: float
    delta_digest: str


class Round(Record, frozen=True, kw_only=True):
    """One closed round: the only commit point of weights, outer and inner state, data and token position.

    ``closer`` is the attempt that committed it, ``parent`` the digest of the round before (``None`` for round 0),
    ``tokens`` counts all committed ones,
    ``ema`` the moving average of the weights where one is wanted, ``failures`` how often a position was lost with its worker or in a rejected delta, ``rejected`` why deltas
    of the round before are not in the weights. ``empty_rounds`` counts rounds in a row that committed nothing;
    ``stopped`` says why the run ends here before its data and tokens do.
    """

    nonce: str
    closer: str = ""
    round: int
    parent: str | None
    weights: Payload
    outer: Payload | None = None
    inner: Payload | None = None
    ema: Payload | None = None
    accepted: list[Accepted] = []
    done: list[Range] = []
    skipped: list[Range] = []
    failures: dict[int, int] = {}
    tokens: int = 0
    final: bool = False
    rejected: dict[str, str] = {}
    empty_rounds: int = 0
    stopped: str = ""
    schema: int = SCHEMA

    @property
    def settled(self) -> Positions:
        """Every position that nobody has to train any more: done or skipped."""
        return Positions.from_ranges((*self.done, *self.skipped))

    def lost_since(self, before: "Round") -> int:
        """Claims of this round whose work is in no model; ``before`` is its parent."""
        return sum(max(count - before.failures.get(p, 0), 0) for p, count in self.failures.items())


class Delta(Record, frozen=True, kw_only=True):
    """What one worker publishes for a round, tensors first; ``base`` is the digest of the round it started from.

    ``released`` are claims given up unharmed, ``failed`` those whose training raised; neither is in the
    tensors. Without any trained position ``tensors`` is ``None``: the worker only says good-bye.
    """

    base: str
    attempt: str
    positions: list[Range]
    tokens: int
    loss: float
    encoding: Encoding
    tensors: Payload | None
    inner: Payload | None = None
    released: list[Range] = []
    failed: list[Range] = []
    schema: int = SCHEMA


class ClaimRecord(Record, frozen=True, kw_only=True):
    """Who claimed a position in a round."""

    attempt: str
    nonce: str


class Validation(Record, frozen=True, kw_only=True):
    """Held-out figures of a round's weights, measured by ``attempt``: loss in nats per token, bits per byte.

    ``tokens`` were predicted and stand for ``bytes``; ``tokens_total`` had been trained. ``None`` are figures that are
    not finite, for which JSON has no word.
    """

    round: int
    attempt: str
    weights: Payload
    tokens_total: int
    loss: float | None
    bits_per_byte: float | None
    tokens: int
    bytes: int
    schema: int = SCHEMA


R = TypeVar("R", bound=Record)


def decode(kind: type[R], content: bytes, *, where: str) -> R:
    """The record in ``content``.

    Raises ``IntegrityError`` naming ``where`` for anything else, ``LineageMismatch`` for a newer schema.
    """
    try:
        record = msgspec.json.decode(content, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise IntegrityError(f"{where} is not a readable {kind.__name__}: {error}.") from error
    schema = getattr(record, "schema", SCHEMA)
    if schema > SCHEMA:
        raise LineageMismatch(
            f"{where} was written by a newer metaflow-hf (schema {schema}, this one reads up to {SCHEMA}): upgrade "
            "metaflow-hf in this environment."
        )
    return record


def digest_of(content: bytes) -> str:
    """The sha256 that names stored bytes."""
    return hashlib.sha256(content).hexdigest()


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level of dotted paths, for comparing and showing them."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{path}."))
        else:
            flat[path] = value
    return flat
