"""Rows -> documents of tokens -> batches of tensors.

Everything here is deterministic: the same rows give the same batches on every machine, every token of every
document is in exactly one batch, and labels follow transformers' convention (``labels`` are the ``input_ids``
where a token counts, ``IGNORE_INDEX`` elsewhere; models shift them by one themselves).

Shapes: B sequences of S tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor

from metaflow_hf.data.chat import encode_conversation
from metaflow_hf.errors import BadRowError, ConfigError

IGNORE_INDEX: Final = -100


@dataclass(frozen=True, slots=True)
class Document:
    """The tokens of one row; ``labels`` has the length of ``input_ids``."""

    input_ids: Sequence[int]
    labels: Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """``input_ids``, ``labels``, ``attention_mask`` (1 for tokens, 0 for padding): all int64 of shape [B, S].

    ``is_long`` marks a single document longer than ``sequence_length``, meant for the chunked rollout.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor
    position_ids: Tensor | None = None
    is_long: bool = False

    @property
    def num_tokens(self) -> int:
        """Labels that count after the shift by one: the divisor of the loss."""
        return int((self.labels[:, 1:] != IGNORE_INDEX).sum())

    @property
    def num_input_tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.attention_mask.sum())

    def to_mapping(self) -> dict[str, Tensor]:
        """The keyword arguments of a transformers model."""
        tensors = {"input_ids": self.input_ids, "labels": self.labels, "attention_mask": self.attention_mask}
        return tensors if self.position_ids is None else {**tensors, "position_ids": self.position_ids}


def encode_rows(
    rows: Sequence[Mapping[str, Any] | str],
    tokenizer: Any,
    *,
    text_column: str = "text",
    loss_on: Literal["assistant", "all"] = "assistant",
) -> list[Document]:
    """One document per row with text, in order; rows without text give none.

    ``tokenizer`` is a transformers tokenizer; its own special tokens are added as it does by default. A row
    whose ``text_column`` holds a list is a conversation: the tokenizer's chat template is applied, and with
    ``loss_on="assistant"`` only what the assistant says (with the template's own end of turn) carries labels.
    Raises ``BadRowError`` naming the row for a value that is neither text nor a conversation.
    """
    values = [row if isinstance(row, str) else row.get(text_column) for row in rows]
    texts = [value for value in values if isinstance(value, str) and value]
    encoded: Iterator[list[int]] = iter(tokenizer(texts, verbose=False)["input_ids"] if texts else [])
    documents = []
    for number, value in enumerate(values):
        if not value:
            continue
        if isinstance(value, str):
            ids = next(encoded)
            documents.append(Document(ids, ids))
        elif isinstance(value, list):
            documents.append(Document(*encode_conversation(value, tokenizer, loss_on=loss_on, row=number)))
        else:
            raise BadRowError(
                f"row {number}: column {text_column!r} holds {type(value).__name__}, expected text or a list of "
                "messages."
            )
    return documents


def make_batches(
    documents: Sequence[Document],
    *,
    sequence_length: int,
    batch_size: int = 8,
    packing: bool = True,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
    long_documents: Literal["split", "rollout", "truncate"] = "split",
) -> list[Batch]:
    """All batches of a claim, in order, each of at most ``batch_size`` sequences of ``sequence_length`` tokens.

    Every document ends with ``eos_token_id`` (added where it is missing; ``None`` adds nothing), then

    - with ``packing`` the documents are concatenated and cut, so only the last sequence may be shorter;
    - without, each document begins a sequence of its own.

    A document longer than ``sequence_length`` is cut into several sequences (``"split"``), kept whole in a
    batch of its own after the others (``"rollout"``, B = 1, ``is_long``), or cut off (``"truncate"``, the only
    policy that drops tokens). A batch is padded on the right to its longest sequence. Documents without a
    label after the shift are kept: their tokens are context.
    """
    if sequence_length < 2 or batch_size < 1:
        raise ConfigError(
            f"sequence_length must be at least 2 and batch_size at least 1, got {sequence_length} and "
            f"{batch_size}."
        )
    ended = [_end(document, eos_token_id) for document in documents if document.input_ids]
    long: list[Document] = []
    if long_documents == "rollout":
        long = [document for document in ended if len(document.input_ids) > sequence_length]
        ended = [document for document in ended if len(document.input_ids) <= sequence_length]
    elif long_documents == "truncate":
        ended = [
            Document(document.input_ids[:sequence_length], document.labels[:sequence_length])
            for document in ended
        ]
    sequences = [_join(ended)] if packing and ended else ended
    pieces = [piece for sequence in sequences for piece in _cut(sequence, sequence_length)]
    pad = pad_token_id if pad_token_id is not None else (eos_token_id or 0)
    return [
        *(_collate(pieces[i : i + batch_size], pad) for i in range(0, len(pieces), batch_size)),
        *(_collate([document], pad, is_long=True) for document in long),
    ]


def _end(document: Document, eos_token_id: int | None) -> Document:
    if eos_token_id is None or document.input_ids[-1] == eos_token_id:
        return document
    # In a conversation the end carries loss only if the last turn does.
    label = eos_token_id if document.labels[-1] != IGNORE_INDEX else IGNORE_INDEX
    return Document([*document.input_ids, eos_token_id], [*document.labels, label])


def _join(documents: Sequence[Document]) -> Document:
    return Document(
        [token for document in documents for token in document.input_ids],
        [label for document in documents for label in document.labels],
    )


def _cut(document: Document, length: int) -> Iterator[Document]:
    for start in range(0, len(document.input_ids), length):
        yield Document(document.input_ids[start : start + length], document.labels[start : start + length])


def _collate(documents: Sequence[Document], pad: int, *, is_long: bool = False) -> Batch:
    shape = (len(documents), max(len(document.input_ids) for document in documents))
    input_ids = torch.full(shape, pad, dtype=torch.long)
    labels = torch.full(shape, IGNORE_INDEX, dtype=torch.long)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    for i, document in enumerate(documents):
        length = len(document.input_ids)
        input_ids[i, :length] = torch.tensor(document.input_ids, dtype=torch.long)
        labels[i, :length] = torch.tensor(document.labels, dtype=torch.long)
        attention_mask[i, :length] = 1
    return Batch(input_ids=input_ids, labels=labels, attention_mask=attention_mask, is_long=is_long)
