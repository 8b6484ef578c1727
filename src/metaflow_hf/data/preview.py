"""What training sees of a dataset: the tokens of one batch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from metaflow_hf.data.batches import Piece, make_batches, pieces
from metaflow_hf.data.manager import BlockManager
from metaflow_hf.data.manifest import Documents
from metaflow_hf.data.stored import find_dataset
from metaflow_hf.data.tokens import ExampleEncoder, LossOn
from metaflow_hf.errors import SelectionError


@dataclass(frozen=True, slots=True, kw_only=True)
class PreviewedBatch:
    """One batch; ``sequences`` are its tokens without padding, ``num_batches`` is how many its rows make.

    ``dataset`` is the name of its dataset in a mixture, whose blocks ``block_id`` counts then.
    """

    block_id: int
    start: int
    stop: int
    number: int
    num_batches: int
    sequences: list[list[Piece]]
    dataset: str = ""

    def summary(self) -> str:
        """One line: which rows, and what became of them."""
        tokens = sum(map(len, self.sequences))
        with_loss = sum(piece.has_loss for sequence in self.sequences for piece in sequence)
        dataset = f"{self.dataset}, " if self.dataset else ""
        return (
            f"{dataset}block {self.block_id}, rows {self.start} to {self.stop - 1}: batch {self.number} of {self.num_batches} with "
            f"{len(self.sequences)} sequence{'s' * (len(self.sequences) != 1)}, {tokens:,} tokens, {with_loss:,} with loss"
        )

    def spans(self, sequence: int) -> Iterator[tuple[bool, str]]:
        """The text of a sequence in runs of tokens with and without loss; control characters are shown as escapes."""
        for has_loss, run in groupby(self.sequences[sequence], key=lambda piece: piece.has_loss):
            yield has_loss, _visible("".join(piece.text for piece in run))

    def to_json(self) -> dict[str, Any]:
        return {
            "block_id": self.block_id,
            "rows": [self.start, self.stop],
            "batch": self.number,
            "num_batches": self.num_batches,
            **({"dataset": self.dataset} if self.dataset else {}),
            "sequences": [
                [{"token": piece.token, "text": piece.text, "loss": piece.has_loss} for piece in sequence]
                for sequence in self.sequences
            ],
        }


def preview_batch(
    dataset: str,
    tokenizer: Any,
    *,
    block_id: int = 0,
    start: int = 0,
    rows: int = 16,
    number: int = 0,
    sequence_length: int = 1024,
    batch_size: int = 8,
    packing: bool = True,
    loss_on: LossOn = "assistant",
    format: str = "auto",  # noqa: A002  the name of the setting
    columns: Mapping[str, str] | None = None,
    text_column: str | None = None,
    documents: Documents = "whole",
) -> PreviewedBatch:
    """Batch ``number`` of those that ``rows`` rows of a block make, from row ``start`` on, in the order of the file.

    ``dataset`` is a directory, URI or key of a dataset of blocks, or a source, of which only what is needed is built.
    ``documents`` says what a row of a PDF of such a source is.
    Raises ``SelectionError`` for rows or a batch that do not exist, and whatever encoding the rows raises.
    """
    stored = find_dataset(dataset)
    with BlockManager(
        stored or dataset,
        format=format,
        columns=columns,
        text_column=text_column,
        documents=documents,
        enable_prefetch=False,
    ) as blocks:
        try:
            stop = min(start + rows, blocks.get_block(block_id).total_samples)
            chosen = blocks.read_rows(block_id, start, stop)
        except IndexError as error:
            raise SelectionError(str(error)) from error
        encoded = ExampleEncoder(tokenizer, blocks.format, loss_on=loss_on).encode(chosen)
    batches = make_batches(
        encoded,
        sequence_length=sequence_length,
        batch_size=batch_size,
        packing=packing,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    if number >= len(batches):
        raise SelectionError(
            f"these {len(chosen)} rows make {len(batches)} batches; there is no batch {number}."
        )
    return PreviewedBatch(
        block_id=block_id,
        start=start,
        stop=stop,
        number=number,
        num_batches=len(batches),
        sequences=pieces(batches[number], tokenizer),
    )


def _visible(text: str) -> str:
    return "".join(
        char if char in "\n\t" or char.isprintable() else char.encode("unicode_escape").decode()
        for char in text
    )
