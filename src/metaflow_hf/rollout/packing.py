"""Padding and packing taken out of a batch, so that token chunks need no mask and documents never meet.

Causal attention and states look back only: what stands on the right of a row's last token changes nothing before it.
So left padding moves to the right, where no mask is needed, and each packed document becomes a row of its own, with
its own carry. Both give what one pass over the batch gives, with block-diagonal attention for packed documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from metaflow_hf.errors import UnsupportedModelError
from metaflow_hf.rollout.sequence import TokenSequence


def without_mask(sequence: TokenSequence, *, movable: bool) -> TokenSequence:
    """The same tokens and targets, each row from its first token on; a mask is kept only where it is needed.

    Not `movable` are tokens of a model that takes no positions: it may count them from the left, padding included.
    Then only padding on the right goes.

    A label on the first token after left padding is predicted by that padding: then one padded token stays, and the
    mask with it. A mask with holes, or with targets on padded tokens, stays as it is.
    """
    mask = sequence.attention_mask
    if mask is None:
        return sequence
    real = mask != 0
    places = torch.arange(sequence.num_tokens, device=real.device)
    length = real.sum(dim=1)
    first = real.int().argmax(dim=1)
    stop = first + length
    inside = (places >= first[:, None]) & (places < stop[:, None])
    counted = sequence.targets != sequence.ignore_index
    predicts_first = ((places == first[:, None] - 1) & counted).any(dim=1)
    on_padding = counted & ~inside & (places != first[:, None] - 1)
    stays = not movable and bool(first.any())
    if stays or not torch.equal(inside, real) or bool(on_padding.any()):
        return sequence
    first = first - predicts_first.int()
    rows = _cut(sequence, torch.arange(len(first), device=real.device), first, stop)
    if not predicts_first.any():
        return rows
    kept = torch.ones_like(rows.input_ids)
    kept[predicts_first, 0] = 0
    return replace(rows, attention_mask=kept)


def documents_apart(sequence: TokenSequence, chunk_size: int) -> list[TokenSequence]:
    """The sequence itself where every row is one document, else groups of documents, each a row of its own.

    A document begins where positions do not follow on those before; with a mask, where they go back or stand still.
    Documents without any target are left out: nothing that counts sees them. Those of similar length stand together,
    as many as give at most the tokens that a token chunk of the whole batch has. Raises UnsupportedModelError for
    packed rows with targets on padding, or with padding inside a document.
    """
    real, begins = _real_and_begins(sequence)
    if int(begins.sum()) <= int(real.any(dim=1).sum()):
        return [sequence]
    row, first, stop = _documents(real, begins)
    counted = sequence.targets != sequence.ignore_index
    _refuse_unclear(real, counted, row, first, stop)
    has_target = _sums(counted, row, first, stop) > 0
    row, first, stop = row[has_target], first[has_target], stop[has_target]
    order = (stop - first).argsort(descending=True, stable=True)
    groups = _groups((stop - first)[order].tolist(), chunk_size, len(sequence.input_ids) * chunk_size)
    return [_cut(sequence, row[part], first[part], stop[part]) for part in (order[a:b] for a, b in groups)]


def _groups(lengths: list[int], chunk_size: int, budget: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of each group of lengths, which fall; none is shorter than half of the longest of its group."""
    start = 0
    while start < len(lengths):
        longest = lengths[start]
        limit = start + max(budget // min(longest, chunk_size), 1)
        stop = start + 1
        while stop < min(limit, len(lengths)) and 2 * lengths[stop] >= longest:
            stop += 1
        yield start, stop
        start = stop


def _real_and_begins(sequence: TokenSequence) -> tuple[Tensor, Tensor]:
    """Both bool [B, S]: tokens that are not padding, and those of them that begin a document."""
    positions, mask = sequence.position_ids, sequence.attention_mask
    real = torch.ones_like(positions, dtype=torch.bool) if mask is None else mask != 0
    last_real = _last_real(real)
    before = functional.pad(last_real[:, :-1], (1, 0), value=-1)
    position_before = positions.gather(1, before.clamp(min=0))
    goes_on = positions > position_before if mask is not None else positions == position_before + 1
    return real, real & ((before < 0) | ~goes_on)


def _last_real(real: Tensor) -> Tensor:
    """Column of the last token up to and with each one that is not padding; -1 where none is."""
    places = torch.arange(real.shape[1], device=real.device).expand_as(real)
    return torch.where(real, places, -1).cummax(dim=1).values


def _documents(real: Tensor, begins: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row, first column and column after the last of each document, padding behind it left out."""
    row, first = begins.nonzero(as_tuple=True)
    next_first = torch.where(row.roll(-1) == row, first.roll(-1), real.shape[1])
    next_first[-1] = real.shape[1]
    return row, first, _last_real(real)[row, next_first - 1] + 1


def _refuse_unclear(real: Tensor, counted: Tensor, row: Tensor, first: Tensor, stop: Tensor) -> None:
    if bool((counted & ~real).any()):
        where = int((counted & ~real).nonzero()[0, 0])
        raise UnsupportedModelError(
            f"packed documents: row {where} has a label that only padding could predict. Set labels on and after "
            "padding to be ignored."
        )
    holes = _sums(real, row, first, stop) < stop - first
    if bool(holes.any()):
        raise UnsupportedModelError(
            f"packed documents: row {int(row[holes][0])} has padding inside a document. Take the padding out."
        )


def _sums(flags: Tensor, row: Tensor, first: Tensor, stop: Tensor) -> Tensor:
    """How many flags [B, S] are set in columns [first, stop) of each row."""
    before = functional.pad(flags.int().cumsum(dim=1), (1, 0))
    return before[row, stop] - before[row, first]


def _cut(sequence: TokenSequence, row: Tensor, first: Tensor, stop: Tensor) -> TokenSequence:
    """Tokens [first, stop) of the given rows, [N, longest]; what is shorter is filled up on the right."""
    length = stop - first
    places = torch.arange(max(int(length.max()), 1), device=row.device)
    column = (first[:, None] + places).clamp(max=sequence.num_tokens - 1)
    filling = places >= length[:, None]
    positions = sequence.position_ids[row[:, None], column]
    end = positions.gather(1, (length[:, None] - 1).clamp(min=0))
    # Filling counts on, but never beyond positions that the model is known to have.
    onward = (end + places - length[:, None] + 1).clamp(max=int(sequence.position_ids.max()))
    return TokenSequence(
        input_ids=sequence.input_ids[row[:, None], column],
        targets=sequence.targets[row[:, None], column].masked_fill(filling, sequence.ignore_index),
        attention_mask=None,
        position_ids=torch.where(filling, onward, positions),
        ignore_index=sequence.ignore_index,
    )
