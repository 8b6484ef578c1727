"""A worker's batches: from the rows of a claim, ahead of time in a thread where the next claim is foreseen."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from metaflow_hf.config import TrainConfig
from metaflow_hf.data.batches import Batch, EncodedExample, LeftOut, make_batches
from metaflow_hf.data.ledger import Claim
from metaflow_hf.data.mixture import name_block
from metaflow_hf.data.order import Order
from metaflow_hf.data.prefetch import Prefetcher
from metaflow_hf.data.tokens import ExampleEncoder
from metaflow_hf.errors import UnsupportedModelError
from metaflow_hf.train.sides import NOTHING_HELD_OUT, HeldOut, example_of

logger = logging.getLogger("metaflow_hf.train")


class RowReader(Protocol):
    """Where the rows of a claim come from; ``BlockManager`` is one."""

    def read_rows(self, block_id: int, start: int, stop: int) -> list[dict[str, Any]]: ...


@dataclass(slots=True)
class Prepared:
    """What one claim is trained on, and what of it is not: documents too long, and rows that are held out."""

    batches: list[Batch]
    left_out: LeftOut = field(default_factory=LeftOut)
    held_out: int = 0
    documents: int = 0


class Feed:
    """Batches of claims: a function of rows, encoder and configuration, whoever asks and whenever.

    At most one claim is made ready ahead of the one that is trained, so memory holds the batches of two. Rows that
    ``held_out`` holds are not trained; ``max_positions`` are those that the model knows, ``max_tokens`` the number of
    tokens that it has embeddings for.
    """

    def __init__(
        self,
        rows: RowReader,
        order: Order,
        encoder: ExampleEncoder,
        config: TrainConfig,
        *,
        max_positions: int | None = None,
        max_tokens: int | None = None,
        held_out: HeldOut = NOTHING_HELD_OUT,
    ) -> None:
        self._rows = rows
        self._order = order
        self._encoder = encoder
        self._tokenizer = encoder.tokenizer
        self._config = config
        self._max_positions = max_positions
        self._max_tokens = max_tokens
        self._held_out = held_out
        self._ahead: tuple[int, Prefetcher[Prepared]] | None = None
        self.left_out = LeftOut()

    def prepared(self, claim: Claim) -> Prepared:
        """What becomes of a claim, made on the spot. Raises ``BadRowError`` and the store's errors."""
        return self._prepare(claim)

    def batches(self, claim: Claim) -> list[Batch]:
        """The batches of a claim, made on the spot. Raises ``BadRowError`` and the store's errors."""
        return self._prepare(claim).batches

    def prepare(self, claim: Claim) -> None:
        """Begins to make the batches of a claim in a thread; what was made ready for another one is dropped."""
        if self._ahead is not None and self._ahead[0] == claim.position:
            return
        self.close()
        self._ahead = (claim.position, Prefetcher(map(self._prepare, (claim,))))

    def take(self, claim: Claim) -> list[Batch]:
        """``batches``, without waiting where they were prepared; an error of the thread is raised here.

        What is left out is added to ``left_out``, and logged.
        """
        if self._ahead is not None and self._ahead[0] == claim.position:
            (_, ahead), self._ahead = self._ahead, None
            with ahead:
                prepared = next(ahead)
        else:
            # One tokenizer must not be used by two threads.
            self.close()
            prepared = self._prepare(claim)
        self._count(claim, prepared)
        return prepared.batches

    def close(self) -> None:
        """Ends the thread and drops what nobody took; idempotent."""
        if self._ahead is not None:
            (_, ahead), self._ahead = self._ahead, None
            ahead.close()

    def _prepare(self, claim: Claim) -> Prepared:
        rows = self._rows.read_rows(claim.block_id, claim.start, claim.stop)
        numbers = [n for n in self._order.row_order(claim.position) if not self._is_held_out(rows[n])]
        documents = self._encoder.encode(
            [rows[number] for number in numbers],
            name_row=lambda index: (
                f"{name_block(self._rows, claim.block_id)}, row {claim.start + numbers[index]}"
            ),
        )
        check_tokens(documents, self._tokenizer, self._max_tokens)
        prepared = Prepared([], held_out=len(rows) - len(numbers), documents=len(documents))
        data = self._config.data
        policy: Any = data.long_documents
        if self._config.rollout.use_chunked_training is True:
            documents = [piece for item in documents for piece in self._known(item, prepared.left_out)]
            policy = "rollout"
        prepared.batches = make_batches(
            documents,
            sequence_length=data.sequence_length,
            batch_size=data.batch_size,
            packing=data.packing,
            eos_token_id=self._tokenizer.eos_token_id,
            pad_token_id=self._padding(),
            long_documents=policy,
            left_out=prepared.left_out,
        )
        return prepared

    def _padding(self) -> int | None:
        """The token that pads, unless it was added to the tokenizer alone; any other does as well, for it is masked."""
        token: int | None = self._tokenizer.pad_token_id
        unknown = token is not None and self._max_tokens is not None and token >= self._max_tokens
        return None if unknown else token

    def _is_held_out(self, row: dict[str, Any]) -> bool:
        if not self._held_out.holds_any:
            return False
        example = example_of(row, self._encoder.format)
        return example is not None and self._held_out.holds(example)

    def _known(self, document: EncodedExample, left_out: LeftOut) -> Iterator[EncodedExample]:
        """The document whole, or what the policy makes of it where it (with its end) exceeds the known positions."""
        total = len(document.input_ids)
        if self._max_positions is None or total <= self._max_positions:
            yield document
            return
        # Each piece ends as a document does.
        length, policy = max(self._max_positions - 1, 1), self._config.data.long_documents
        if policy == "split":
            for start in range(0, total - 1, length):
                yield document.cut(start, total if start + length >= total - 1 else start + length)
            return
        kept = length if policy == "truncate" else 0
        left_out.documents, left_out.tokens = left_out.documents + 1, left_out.tokens + total - kept
        if kept:
            yield document.cut(0, kept)

    def _count(self, claim: Claim, prepared: Prepared) -> None:
        found, total = prepared.left_out, self.left_out
        total.documents, total.tokens = total.documents + found.documents, total.tokens + found.tokens
        if found.documents:
            logger.info(
                f"position {claim.position}: data.long_documents: {self._config.data.long_documents} left out "
                f"{found.tokens:,} tokens of {found.documents:,} documents ({total.tokens:,} of {total.documents:,} so far)"
            )
        if prepared.held_out and self._config.data.evaluation_dataset is not None:
            logger.info(
                f"position {claim.position}: {prepared.held_out:,} rows are in data.evaluation_dataset too: held out, "
                "not trained"
            )
        elif prepared.held_out:
            logger.debug(f"position {claim.position}: {prepared.held_out:,} rows are held out")


def check_tokens(documents: Sequence[EncodedExample], tokenizer: Any, known: int | None) -> None:
    """Raises ``UnsupportedModelError`` for a token that the model has no embedding for; ``known`` is how many it has.

    A GPU would only say that something went wrong in some kernel, and be of no use afterwards.
    """
    end = tokenizer.eos_token_id
    largest = max((max(item.input_ids) for item in documents if item.input_ids), default=0)
    if documents and end is not None:
        largest = max(largest, end)
    if known is not None and largest >= known:
        raise UnsupportedModelError(
            f"the tokenizer makes the token {tokenizer.decode([largest])!r} (number {largest}), but the model has embeddings "
            f"for {known} tokens only: take the tokenizer that belongs to the model, or give the model an embedding for it "
            "(resize_token_embeddings) before training."
        )
