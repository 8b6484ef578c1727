"""Documents of tokens -> batches of tensors.

Everything here is deterministic: the same documents give the same batches on every machine, every token of every
document is in exactly one batch (unless a policy that drops tokens was chosen, which counts them), and labels
follow transformers' convention (``labels`` are the ``input_ids`` where a token counts, ``IGNORE_INDEX`` elsewhere;
models shift them by one themselves).

Shapes: B sequences of S tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from metaflow_hf.data.tokens import IGNORE_INDEX, EncodedExample, encode_examples, end_example
from metaflow_hf.errors import ConfigError

__all__ = [
    "IGNORE_INDEX",
    "Batch",
    "EncodedExample",
    "LeftOut",
    "Piece",
    "encode_examples",
    "make_batches",
    "pieces",
]

Packing = bool | Literal["isolated"]
LongDocuments = Literal["split", "rollout", "truncate", "drop"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """``input_ids``, ``labels``, ``attention_mask`` (1 for tokens, 0 for padding): all int64 of shape [B, S].

    ``position_ids`` [B, S] count from 0 in each document where documents of one sequence must not see each other.
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

    def to_mapping(self) -> dict[str, Any]:
        """The keyword arguments of a transformers model."""
        tensors = {"input_ids": self.input_ids, "labels": self.labels}
        if self.position_ids is None:
            return {**tensors, "attention_mask": self.attention_mask}
        # transformers keeps documents apart by their positions, but only without a mask and without a cache; with
        # either they silently see each other.
        return {**tensors, "position_ids": self.position_ids, "use_cache": False}


@dataclass(slots=True)
class LeftOut:
    """What was not trained because it was too long, counted by ``make_batches``: documents that lost tokens or were
    dropped as a whole, and their tokens.
    """

    documents: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Piece:
    """One token of a batch as people read it; ``has_loss`` says whether the model is judged by predicting it."""

    text: str
    token: int
    has_loss: bool


def make_batches(
    documents: Sequence[EncodedExample],
    *,
    sequence_length: int,
    batch_size: int = 8,
    packing: Packing = True,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
    long_documents: LongDocuments = "split",
    left_out: LeftOut | None = None,
) -> list[Batch]:
    """All batches of a claim, in order, each of at most ``batch_size`` sequences of ``sequence_length`` tokens.

    Every document ends with ``eos_token_id`` (added where it is missing; ``None`` adds nothing), then

    - with ``packing`` the documents are concatenated and cut, so only the last sequence may be shorter;
    - with ``packing="isolated"`` as well, but documents of one sequence do not see each other: positions begin
      anew in each, and its first token is predicted from nothing;
    - without, each document begins a sequence of its own.

    A document longer than ``sequence_length`` is cut into several sequences (``"split"``), kept whole in a batch
    of its own after the others (``"rollout"``, B = 1, ``is_long``), cut off (``"truncate"``) or left out
    (``"drop"``); what the last two leave out is added to ``left_out``. A batch is padded on the right to its
    longest sequence, with ``pad_token_id``, else ``eos_token_id``, else 0. Documents without a label after the
    shift are kept: their tokens are context. Raises ``ConfigError`` for sizes that make no sense.
    """
    if sequence_length < 2 or batch_size < 1:
        raise ConfigError(
            f"sequence_length must be at least 2 and batch_size at least 1, got {sequence_length} and "
            f"{batch_size}."
        )
    ended = [end_example(document, eos_token_id) for document in documents if document.input_ids]
    fitting, long = _fit(ended, sequence_length, long_documents, left_out or LeftOut())
    joined = [_Joined.of(fitting)] if packing and fitting else [_Joined.of([item]) for item in fitting]
    sequences = [piece for item in joined for piece in item.cut(sequence_length)]
    pad = pad_token_id if pad_token_id is not None else (eos_token_id or 0)
    isolated = packing == "isolated"
    return [
        *(
            _collate(sequences[i : i + batch_size], pad, isolated=isolated)
            for i in range(0, len(sequences), batch_size)
        ),
        *(_collate([_Joined.of([document])], pad, is_long=True) for document in long),
    ]


def pieces(batch: Batch, tokenizer: Any) -> list[list[Piece]]:
    """Each sequence of a batch, token by token without padding, as a model is trained on it."""
    shown = []
    for ids, labels, mask in zip(batch.input_ids, batch.labels, batch.attention_mask, strict=True):
        length = int(mask.sum())
        # Nothing predicts the first token of a sequence.
        counts = [False, *(labels[1:length] != IGNORE_INDEX).tolist()]
        tokens = ids[:length].tolist()
        shown.append(
            [Piece(tokenizer.decode([t]), t, count) for t, count in zip(tokens, counts, strict=True)]
        )
    return shown


@dataclass(frozen=True, slots=True)
class _Joined:
    """Documents one after the other; ``starts`` are the places where one begins."""

    input_ids: Sequence[int]
    labels: Sequence[int]
    starts: Sequence[int]

    @classmethod
    def of(cls, documents: Sequence[EncodedExample]) -> "_Joined":
        starts, place = [], 0
        for document in documents:
            starts.append(place)
            place += len(document.input_ids)
        return cls(
            [token for document in documents for token in document.input_ids],
            [label for document in documents for label in document.labels],
            starts,
        )

    def cut(self, length: int) -> Iterator["_Joined"]:
        following = iter([*self.starts, len(self.input_ids)])
        upcoming = next(following)
        for start in range(0, len(self.input_ids), length):
            stop, starts = min(start + length, len(self.input_ids)), [0]
            while upcoming < stop:
                starts += [upcoming - start] if upcoming > start else []
                upcoming = next(following)
            yield _Joined(self.input_ids[start:stop], self.labels[start:stop], starts)


def _fit(
    documents: Sequence[EncodedExample], limit: int, policy: LongDocuments, left_out: LeftOut
) -> tuple[list[EncodedExample], list[EncodedExample]]:
    """Documents for ordinary batches, and those that go alone."""
    if policy == "split":
        return list(documents), []
    fitting, long = [], []
    for document in documents:
        excess = len(document.input_ids) - limit
        if excess <= 0:
            fitting.append(document)
        elif policy == "rollout":
            long.append(document)
        elif policy == "truncate":
            fitting.append(document.cut(0, limit))
            left_out.documents, left_out.tokens = left_out.documents + 1, left_out.tokens + excess
        else:
            left_out.documents, left_out.tokens = left_out.documents + 1, left_out.tokens + excess + limit
    return fitting, long


def _collate(
    sequences: Sequence[_Joined], pad: int, *, isolated: bool = False, is_long: bool = False
) -> Batch:
    shape = (len(sequences), max(len(sequence.input_ids) for sequence in sequences))
    input_ids = torch.full(shape, pad, dtype=torch.long)
    labels = torch.full(shape, IGNORE_INDEX, dtype=torch.long)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    position_ids = torch.zeros(shape, dtype=torch.long) if isolated else None
    for i, sequence in enumerate(sequences):
        length = len(sequence.input_ids)
        input_ids[i, :length] = torch.tensor(sequence.input_ids, dtype=torch.long)
        labels[i, :length] = torch.tensor(sequence.labels, dtype=torch.long)
        attention_mask[i, :length] = 1
        if position_ids is not None:
            for start, stop in zip(sequence.starts, [*sequence.starts[1:], length], strict=True):
                position_ids[i, start:stop] = torch.arange(stop - start)
            labels[i, list(sequence.starts)] = IGNORE_INDEX
    return Batch(
        input_ids=input_ids,
        labels=labels,
        attention_mask=attention_mask,
        position_ids=position_ids,
        is_long=is_long,
    )
