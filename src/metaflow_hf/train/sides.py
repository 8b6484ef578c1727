"""The side of each row: trained, or held out. Decided by the hash of what the row says, so copies are on one side."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

from metaflow_hf.data.formats import DetectedFormat, Example, RowProblem
from metaflow_hf.data.formats.examples import contents
from metaflow_hf.errors import ConfigError

HASHES: Final = 2**64


def example_of(row: Mapping[str, Any], form: DetectedFormat) -> Example | None:
    """What a row says, as it is before any tokenizer; ``None`` for a row without content, or one that is unusable.

    An unusable row is refused, or skipped, where rows are encoded.
    """
    try:
        return form.example(row)
    except RowProblem:
        return None


def key_of(example: Example) -> bytes:
    """Equal for equal contents."""
    return hashlib.sha256(json.dumps(contents(example), sort_keys=True).encode()).digest()


def number_of(key: bytes) -> int:
    """The hash of a text as a number below 2**64."""
    return int.from_bytes(key[:8])


@dataclass(frozen=True, slots=True)
class HeldOutRow:
    """A held-out example, and where it is stored; ``dataset`` is its dataset's name in a mixture."""

    value: Example
    block_id: int
    row: int
    dataset: str = ""

    def __str__(self) -> str:
        place = f"block {self.block_id}, row {self.row}"
        return f"{self.dataset}, {place}" if self.dataset else place


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The side of each row: held out are those whose hash is below ``limit`` (of 2**64), or one of ``keys``.

    Those of ``trained`` are not, whatever their hash: small datasets of a mixture keep them.
    """

    limit: int = 0
    keys: frozenset[bytes] = frozenset()
    trained: frozenset[bytes] = frozenset()

    @classmethod
    def copies_of(cls, rows: Sequence[HeldOutRow]) -> Self:
        """What holds out the rows that say the same as one of ``rows``."""
        return cls(keys=frozenset(key_of(row.value) for row in rows))

    @property
    def holds_any(self) -> bool:
        """Whether any row may be held out."""
        return self.limit > 0 or bool(self.keys)

    @property
    def digest(self) -> str | None:
        """How many ``keys`` there are, and which, for people to compare; ``None`` without."""
        if not self.keys and not self.trained:
            return None
        content = b"".join(sorted(self.keys)) + b"".join(sorted(self.trained))
        return f"{len(self.keys):,} texts, {hashlib.sha256(content).hexdigest()[:12]}"

    def holds(self, example: Example) -> bool:
        """Whether an example is held out."""
        if not self.holds_any:
            return False
        key = key_of(example)
        return key in self.keys or (number_of(key) < self.limit and key not in self.trained)


NOTHING_HELD_OUT: Final = HeldOut()


@dataclass(frozen=True, slots=True)
class Texts:
    """One dataset of a mixture: its samples, and a function that reads the keys of their texts."""

    name: str
    samples: int
    keys: Callable[[], Iterable[bytes]]


def hold_out_of_each(datasets: Sequence[Texts], fraction: float, *, settled_rows: int) -> HeldOut:
    """The sides of a mixture: about the same fraction of the texts of each dataset is held out.

    Every dataset with two different texts has at least one on each side, and at most half of the texts of a small one
    are held out.

    Args:
        datasets: The datasets of the mixture.
        fraction: The part to hold out.
        settled_rows: Of datasets up to this size the texts are chosen one by one; of larger ones by their hash.

    Raises:
        ConfigError: where no dataset has two different texts, or all texts of a dataset are held out because other
            datasets hold them too.

    """
    limit = int(fraction * HASHES)
    large = [one for one in datasets if one.samples > settled_rows and _has_both_sides(one.keys(), limit)]
    small = [(one, sorted(set(one.keys()))) for one in datasets if one not in large]
    held: set[bytes] = set()
    trained: set[bytes] = set()
    # The smallest first: what they need is not taken by those that have more to choose from.
    for one, keys in sorted(small, key=lambda item: len(item[1])):
        wanted = min(max(round(fraction * one.samples), 1), len(keys) // 2)
        free = [key for key in keys if key not in held and key not in trained]
        held.update(free[: max(wanted - len(held.intersection(keys)), 0)])
        trained.update(key for key in keys if key not in held)
        if keys and held.issuperset(keys):
            raise ConfigError(
                f"all texts of the dataset {one.name!r} are held out, because smaller datasets of data.datasets hold them "
                "too: remove that dataset, or name a data.evaluation_dataset."
            )
    if not held and not large:
        raise ConfigError(
            "no dataset of data.datasets holds two different texts, so none can be held out: name a "
            "data.evaluation_dataset."
        )
    if not large:
        return HeldOut(keys=frozenset(held))
    kept = frozenset(key for key in trained if number_of(key) < limit)
    return HeldOut(limit, frozenset(held), kept)


def _has_both_sides(keys: Iterable[bytes], limit: int) -> bool:
    found: set[bool] = set()
    for key in keys:
        found.add(number_of(key) < limit)
        if len(found) == 2:
            return True
    return False
