"""What the rows of a dataset become when they are trained, found by preparing them as a worker would."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Final, Self

from metaflow_hf.config import TrainConfig
from metaflow_hf.data.batches import Batch, pieces
from metaflow_hf.data.ledger import Claim
from metaflow_hf.data.mixture import ReadableBlocks
from metaflow_hf.data.order import Order
from metaflow_hf.data.tokens import ExampleEncoder
from metaflow_hf.errors import ConfigError
from metaflow_hf.train.feed import Feed
from metaflow_hf.train.first_rows import no_token_left
from metaflow_hf.train.sides import HeldOut

logger = logging.getLogger("metaflow_hf.train")

# Datasets up to this size are prepared as a whole, of larger ones so much of them.
SURVEYED_ROWS: Final = 10_000
SURVEYED_BYTES: Final = 8 * 2**20
_SHOWN_TOKENS: Final = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What became of ``rows`` rows of a dataset: of all rows of an epoch where ``is_whole``, else of some of them.

    ``trained`` rows gave ``input_tokens`` tokens, of which ``tokens`` carry loss, in ``sequences`` sequences and
    ``steps`` optimizer steps; ``held_out`` rows are not trained, ``skipped`` counts the unusable ones by reason.
    Of ``documents`` examples ``left_out`` lost tokens because they are too long, and
    ``without_thoughts`` the thoughts of their turns because the chat template leaves them out. ``example`` is one rendered sequence, as runs of text
    with and without loss. ``parts`` are the surveys of the datasets of a mixture.
    """

    rows: int
    trained: int
    held_out: int
    skipped: Mapping[str, int] = field(default_factory=dict)
    input_tokens: int
    tokens: int
    sequences: int
    steps: int
    left_out: int
    without_thoughts: int
    documents: int
    is_whole: bool
    example: tuple[tuple[bool, str], ...] = ()
    parts: tuple["Survey", ...] = ()

    @classmethod
    def of_mixture(cls, parts: Sequence[Self], rows: Sequence[int]) -> Self:
        """The survey of a mixture that trains so many ``rows`` of each dataset, from surveys of the datasets."""
        pairs = list(zip(parts, rows, strict=True))

        def total(count: Callable[[Self], int]) -> int:
            return sum(part.scaled(count(part), number) for part, number in pairs)

        skipped: Counter[str] = Counter()
        for part, number in pairs:
            skipped.update({reason: part.scaled(count, number) for reason, count in part.skipped.items()})
        held_out = total(lambda part: part.held_out)
        return cls(
            rows=sum(rows),
            trained=sum(rows) - held_out - skipped.total(),
            held_out=held_out,
            skipped=dict(skipped),
            input_tokens=total(lambda part: part.input_tokens),
            tokens=total(lambda part: part.tokens),
            sequences=total(lambda part: part.sequences),
            steps=total(lambda part: part.steps),
            left_out=total(lambda part: part.left_out),
            without_thoughts=total(lambda part: part.without_thoughts),
            documents=total(lambda part: part.documents),
            # What is trained a whole number of times is counted, not estimated.
            is_whole=all(part.is_whole and number % part.rows == 0 for part, number in pairs),
            example=next((part.example for part in parts if part.example), ()),
            parts=tuple(parts),
        )

    @property
    def tokens_per_row(self) -> float:
        """Tokens with loss that a row gives which is neither held out nor skipped."""
        return self.tokens / self.trained if self.trained else 0.0

    @property
    def labelled_fraction(self) -> float:
        """The share of tokens that carry loss."""
        return self.tokens / self.input_tokens if self.input_tokens else 0.0

    @property
    def sequences_per_step(self) -> float:
        """How many sequences an optimizer step takes on average."""
        return self.sequences / self.steps if self.steps else 0.0

    def scaled(self, number: int, rows: int) -> int:
        """A count among the surveyed rows for a dataset of so many rows."""
        return number if rows == self.rows else round(number * rows / max(self.rows, 1))


@dataclass(slots=True)
class _Counts:
    rows: int = 0
    held_out: int = 0
    trained: int = 0
    input_tokens: int = 0
    tokens: int = 0
    sequences: int = 0
    steps: int = 0
    left_out: int = 0
    documents: int = 0

    def add(self, batches: list[Batch], accumulated: int) -> None:
        learned = [batch for batch in batches if batch.num_tokens]
        self.input_tokens += sum(batch.num_input_tokens for batch in batches)
        self.tokens += sum(batch.num_tokens for batch in learned)
        self.sequences += sum(len(batch.input_ids) for batch in learned)
        self.steps += -(-len(learned) // accumulated)


class Surveyor:
    """Surveys one dataset, with the encoder, the held-out rows and the limits of a worker."""

    def __init__(
        self,
        blocks: ReadableBlocks,
        encoder: ExampleEncoder,
        config: TrainConfig,
        *,
        held_out: HeldOut,
        max_positions: int | None,
        max_tokens: int | None,
    ) -> None:
        self._blocks = blocks
        self._encoder = encoder
        self._config = config
        self._limits: dict[str, Any] = {
            "held_out": held_out,
            "max_positions": max_positions,
            "max_tokens": max_tokens,
        }

    def survey(self, order: Order) -> Survey:
        """What became of the claims of one epoch, or of some of them, spread evenly.

        Raises ``ConfigError`` when nothing of them would be trained, and ``BadRowError``.
        """
        feed = Feed(self._blocks, order, self._encoder, self._config, **self._limits)
        positions = order.positions_per_epoch
        chosen = self._chosen(order)
        before, counts = sum(self._encoder.skipped.values()), _Counts()
        example: tuple[tuple[bool, str], ...] = ()
        for position in chosen:
            span = order.locate(position)
            claim = Claim(span.block_id, span.chunk_id, span.start, span.stop, span.epoch, position, "")
            prepared = feed.prepared(claim)
            counts.rows += span.stop - span.start
            counts.held_out += prepared.held_out
            counts.left_out += prepared.left_out.documents
            counts.documents += prepared.documents
            counts.add(prepared.batches, self._config.optimizer.gradient_accumulation_steps)
            example = example or self._example(prepared.batches)
        skipped = dict(self._encoder.skipped)
        counts.trained = counts.rows - counts.held_out - (sum(skipped.values()) - before)
        if counts.tokens == 0:
            raise self._nothing_learned(counts)
        return Survey(
            rows=counts.rows,
            trained=counts.trained,
            held_out=counts.held_out,
            skipped=skipped,
            input_tokens=counts.input_tokens,
            tokens=counts.tokens,
            sequences=counts.sequences,
            steps=counts.steps,
            left_out=counts.left_out,
            without_thoughts=self._encoder.without_thoughts,
            documents=counts.documents,
            is_whole=len(chosen) == positions,
            example=example,
        )

    def _chosen(self, order: Order) -> list[int]:
        manifest = self._blocks.manifest
        size = sum(block.size_bytes for block in manifest.blocks)
        share = max(manifest.total_samples / SURVEYED_ROWS, size / SURVEYED_BYTES, 1.0)
        total = order.positions_per_epoch
        wanted = max(round(total / share), 1)
        return [number * total // wanted for number in range(wanted)]

    def _example(self, batches: list[Batch]) -> tuple[tuple[bool, str], ...]:
        batch = next((batch for batch in batches if batch.num_tokens), None)
        if batch is None:
            return ()
        tokens = pieces(batch, self._encoder.tokenizer)[0][:_SHOWN_TOKENS]
        return tuple(
            (has_loss, self._encoder.tokenizer.decode([piece.token for piece in run]))
            for has_loss, run in groupby(tokens, key=lambda piece: piece.has_loss)
        )

    def _nothing_learned(self, counts: _Counts) -> ConfigError:
        if counts.trained <= 0:
            return ConfigError(
                f"of {counts.rows:,} rows {counts.held_out:,} are held out and the others skipped "
                f"({_reasons(self._encoder.skipped)}): nothing is left to train on."
            )
        return no_token_left(self._config, f"{counts.trained:,} rows")


def _reasons(skipped: Mapping[str, int]) -> str:
    return ", ".join(f"{reason}: {count:,}" for reason, count in skipped.items()) or "none"
