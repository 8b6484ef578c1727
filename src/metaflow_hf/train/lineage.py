"""A lineage in the store: its keys, and reading them.

    spec.json                       what is trained, created once
    rounds/<r>.json                 one closed round; creating it is the commit. Never deleted
    weights/<r>/<digest>/…          trained parameters of round r; like the next three safetensors, stored before the round
    outer/<r>/<digest>/…            momentum of the outer optimiser
    inner/<r>/<digest>/…            Adam moments of one worker
    ema/<r>/<digest>/…              moving average of the weights up to round r, where one is wanted
    claims/<r>/<position>.json      who trains a position in the round that starts from r
    deltas/<r>/<attempt>.json       a worker's contribution to that round (….safetensors beside it, first)
    heartbeats/<attempt>            moves while the worker makes progress
    metrics/<attempt>/<n>.jsonl     what a worker told of its work, for reports
    evaluations/<r>.json            held-out figures of round r, measured while training goes on
    exports/<digest>.json           the model reference that a final lineage became (….<n>.json: after it was deleted)
    best/<digest>.json              the same of the round with the best held-out figures, where it is not the last
    averaged/<digest>.json          the same of the moving average
    keep-all                        there when nothing of the lineage may ever be collected

Correctness rests on ``create`` of ``spec.json``, ``claims`` and ``rounds`` alone.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from metaflow_hf.errors import NotFound, StoreUnavailable, TrainingIncomplete
from metaflow_hf.store.objects import CreateResult, Digest, ObjectStore
from metaflow_hf.train.records import (
    ClaimRecord,
    Delta,
    Payload,
    Record,
    Round,
    Spec,
    Validation,
    decode,
    digest_of,
)

logger = logging.getLogger("metaflow_hf.train")

_DIGITS: Final = 10
_SWEPT_KINDS: Final = ("weights", "outer", "inner", "ema", "claims", "deltas")
# What is of no use once training is over, or was given up.
PAYLOAD_KINDS: Final = (*_SWEPT_KINDS, "heartbeats", "metrics")
KEEP_ALL: Final = "keep-all"
_JSON: Final = ".json"


@dataclass(frozen=True, slots=True)
class ClosedRound:
    """A round's manifest together with the digest of its bytes, which deltas and the next round refer to."""

    manifest: Round
    digest: str

    @property
    def number(self) -> int:
        return self.manifest.round


def number_part(number: int) -> str:
    """A number as it stands in keys: zero-padded, so that keys sort like numbers."""
    return f"{number:0{_DIGITS}d}"


class Lineage:
    """Typed access to one lineage; ``store`` is rooted at it. Holds no state but what it has read."""

    def __init__(self, store: ObjectStore) -> None:
        self.store = store
        self._claims: dict[str, str] = {}
        self._validations: dict[str, Validation] = {}

    def spec(self) -> Spec:
        """What the lineage trains. Raises ``TrainingIncomplete`` when it was never started."""
        try:
            content = self.store.get("spec.json")
        except NotFound as error:
            raise TrainingIncomplete(
                f"there is no lineage at {self.store.uri}: start it with start_lineage, or check its name."
            ) from error
        return decode(Spec, content, where=f"{self.store.uri}/spec.json")

    def create_spec(self, spec: Spec) -> Spec:
        """Creates the specification, or returns the one that was there first."""
        result = self.store.create("spec.json", spec.encode())
        return decode(Spec, result.content, where=f"{self.store.uri}/spec.json")

    def keep_all(self) -> None:
        """Says to collections, for ever, that every round of this lineage stays loadable."""
        self.store.create(KEEP_ALL, b"{}")

    def round(self, number: int) -> ClosedRound | None:
        """Round ``number``, or ``None`` while nobody has closed it."""
        key = self._round_key(number)
        try:
            content = self.store.get(key)
        except NotFound:
            return None
        return self._closed(key, content)

    def newest(self, *, after: int = -1) -> ClosedRound | None:
        """The newest closed round, if it is newer than ``after``; one listing from there on."""
        offset = self._round_key(after) if after >= 0 else None
        key = None
        for info in self.store.list("rounds", after=offset):
            key = info.key
        return None if key is None else self._closed(key, self.store.get(key))

    def round_times(self, *, after: int = -1) -> dict[int, datetime]:
        """When the rounds newer than ``after`` were closed, by the store's own clock; one listing from there on."""
        offset = self._round_key(after) if after >= 0 else None
        return {int(_stem(info.key)): info.last_modified for info in self.store.list("rounds", after=offset)}

    def create_round(self, manifest: Round) -> ClosedRound:
        """Commits a round, or returns the one that another closer committed."""
        key = self._round_key(manifest.round)
        return self._closed(key, self._create(key, manifest).content)

    def create_claim(self, number: int, position: int, claim: ClaimRecord) -> bool:
        """Whether ``position`` is now ours in the round that starts from ``number``."""
        key = f"claims/{number_part(number)}/{number_part(position)}{_JSON}"
        created = self._create(key, claim).created
        if created:
            self._claims[key] = claim.attempt
        return created

    def claims(self, number: int) -> dict[int, str]:
        """Position -> attempt of every claim in the round; each is read once in this object's life."""
        found: dict[int, str] = {}
        for info in self.store.list(f"claims/{number_part(number)}"):
            if info.key not in self._claims:
                try:
                    content = self.store.get(info.key)
                except NotFound:
                    continue
                self._claims[info.key] = decode(ClaimRecord, content, where=info.key).attempt
            found[int(_stem(info.key))] = self._claims[info.key]
        return found

    def forget_claims(self) -> None:
        """Drops what was read of claims: their rounds are over."""
        self._claims.clear()

    def published(self, number: int) -> list[str]:
        """The attempts that have published in the round, sorted."""
        listing = self.store.list(f"deltas/{number_part(number)}")
        return sorted(_stem(info.key) for info in listing if info.key.endswith(_JSON))

    def delta(self, number: int, attempt: str) -> tuple[Delta, str]:
        """One published contribution and its digest. Raises ``NotFound``, ``IntegrityError``."""
        key = f"deltas/{number_part(number)}/{attempt}{_JSON}"
        content = self.store.get(key)
        return decode(Delta, content, where=f"{self.store.uri}/{key}"), digest_of(content)

    def publish(self, number: int, delta: Delta) -> bool:
        """Publishes a contribution; its tensors must be stored already. False if another one stands there."""
        return self._create(f"deltas/{number_part(number)}/{delta.attempt}{_JSON}", delta).created

    def upload(self, path: Path, key: str, digest: Digest) -> Payload:
        """Stores a tensor file, which nobody changes any more, under ``key``; the caller then names it in a record."""
        self.store.share(path, key, digest)
        return Payload(key=key, digest=digest.sha256, size=digest.size)

    def upload_delta(self, path: Path, number: int, attempt: str, digest: Digest) -> Payload:
        """Stores the tensors of a contribution beside where its record will stand."""
        return self.upload(path, f"deltas/{number_part(number)}/{attempt}.safetensors", digest)

    def upload_payload(self, path: Path, kind: str, number: int, digest: Digest) -> Payload:
        """Stores a tensor file as a state of round ``number`` under its own digest."""
        key = f"{kind}/{number_part(number)}/{digest.sha256}/model.safetensors"
        return self.upload(path, key, digest)

    def create_validation(self, found: Validation) -> bool:
        """Records held-out figures of a round, once; False when there are some already."""
        return self._create(f"evaluations/{number_part(found.round)}{_JSON}", found).created

    def validations(self) -> list[Validation]:
        """The held-out figures of all measured rounds, in order; each is read once in this object's life."""
        for info in self.store.list("evaluations"):
            if info.key not in self._validations:
                content = self.store.get(info.key)
                self._validations[info.key] = decode(Validation, content, where=info.key)
        return [self._validations[key] for key in sorted(self._validations)]

    def sweep(self, newest: ClosedRound, *, keep: Iterable[str] = ()) -> int:
        """Deletes what no living worker needs: everything of rounds two and more before the newest.

        What the newest round and its parent name stays, however old, and so do the keys to ``keep``. Returns the number
        of deleted objects; a refused delete is logged and left for later.
        """
        parent = self.round(newest.number - 1)
        kept = _named(item for item in (newest, parent) if item is not None) | set(keep)
        deleted = 0
        try:
            for kind in _SWEPT_KINDS:
                for part in self.store.children(kind):
                    if int(part) <= newest.number - 2:
                        deleted += self._delete_all(f"{kind}/{part}", kept)
        except StoreUnavailable as error:
            logger.warning("old rounds of %s could not be swept: %s", self.store.uri, error)
        return deleted

    def _delete_all(self, prefix: str, kept: set[str]) -> int:
        keys = [info.key for info in self.store.list(prefix) if info.key not in kept]
        for key in keys:
            self.store.delete(key)
        return len(keys)

    def _create(self, key: str, record: Record) -> CreateResult:
        return self.store.create(key, record.encode())

    def _closed(self, key: str, content: bytes) -> ClosedRound:
        manifest = decode(Round, content, where=f"{self.store.uri}/{key}")
        return ClosedRound(manifest=manifest, digest=digest_of(content))

    @staticmethod
    def _round_key(number: int) -> str:
        return f"rounds/{number_part(number)}{_JSON}"


def _stem(key: str) -> str:
    return key.rpartition("/")[2].removesuffix(_JSON)


def _named(rounds: Iterable[ClosedRound]) -> set[str]:
    manifests = [item.manifest for item in rounds]
    payloads = [payload for m in manifests for payload in (m.weights, m.outer, m.inner, m.ema)]
    return {payload.key for payload in payloads if payload is not None}
