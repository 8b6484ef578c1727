"""One batch, made ready for cutting: targets shifted, positions derived, token chunks laid out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_KNOWN_KEYS = frozenset({"input_ids", "labels", "attention_mask", "position_ids"})


@dataclass(frozen=True)
class TokenSequence:
    """A batch of sequences; all tensors are [B, S].

    `targets[t]` is the label that the logits at t are judged by: labels moved one to the left over the whole
    sequence, so that cutting loses none at a border. The last column is ignored.
    """

    input_ids: Tensor
    targets: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor
    ignore_index: int

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[1]

    def num_targets(self) -> int:
        """How many targets count in the loss."""
        return int((self.targets != self.ignore_index).sum())

    def refuse_negative_targets(self) -> None:
        """Raises ValueError for a target below 0 that is not the ignored one: kernels for cross entropy pass over -100."""
        negative = (self.targets < 0) & (self.targets != self.ignore_index)
        if bool(negative.any()):
            row, place = negative.nonzero()[0].tolist()
            raise ValueError(
                f"batch['labels'][{row}, {place + 1}] is {int(self.targets[row, place])}: neither a token nor "
                f"ignore_index ({self.ignore_index}). Set labels that do not count to ignore_index."
            )

    @classmethod
    def from_batch(cls, batch: Mapping[str, Any], ignore_index: int, device: torch.device) -> TokenSequence:
        """Reads `input_ids` [B, S] and the optional `labels`, `attention_mask`, `position_ids`.

        Labels default to the input ids with padding ignored. Positions default to the number of attended
        tokens before each one, so that left padding does not move them. Raises ValueError for a batch that
        holds anything else or shapes that differ.
        """
        batch = {key: value for key, value in batch.items() if value is not None}
        _check_batch(batch)
        moved = with_labels(batch, ignore_index, device)
        input_ids, mask = moved["input_ids"], moved.get("attention_mask")
        position_ids = moved.get("position_ids")
        if position_ids is None:
            position_ids = _positions(input_ids, mask)
        else:
            position_ids = position_ids.expand(input_ids.shape[0], -1)
        if mask is not None and bool((mask != 0).all()):
            mask = None  # attention without a mask takes faster kernels
        targets = shifted_targets(moved["labels"], ignore_index)
        return cls(input_ids, targets, mask, position_ids, ignore_index)

    def model_inputs(self, start: int, stop: int) -> dict[str, Tensor]:
        """What a model with a cache takes for tokens [start, stop): the mask covers the past as well."""
        inputs = {
            "input_ids": self.input_ids[:, start:stop],
            "position_ids": self.position_ids[:, start:stop],
        }
        if self.attention_mask is not None:
            inputs["attention_mask"] = self.attention_mask[:, :stop]
        return inputs


def with_labels(batch: Mapping[str, Any], ignore_index: int, device: torch.device) -> dict[str, Any]:
    """The batch on `device`, with `labels`: where missing, the input ids with padding ignored."""
    moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    if moved.get("labels") is None:
        mask = moved.get("attention_mask")
        moved["labels"] = moved["input_ids"]
        if mask is not None:
            moved["labels"] = moved["input_ids"].masked_fill(mask == 0, ignore_index)
    return moved


def shifted_targets(labels: Tensor, ignore_index: int) -> Tensor:
    """What the logits at each token are judged by, from labels [B, S]; the last token has no target."""
    ignored = labels.new_full((labels.shape[0], 1), ignore_index)
    return torch.cat([labels[:, 1:], ignored], dim=1)


def token_chunks(num_tokens: int, chunk_size: int) -> list[tuple[int, int]]:
    """[start, stop) of each token chunk, in order.

    A last chunk of one token is merged with the one before it: transformers takes an in-place decode path
    for a single token.
    """
    starts = list(range(0, num_tokens, chunk_size))
    if len(starts) > 1 and num_tokens - starts[-1] == 1:
        starts.pop()
    return list(zip(starts, [*starts[1:], num_tokens], strict=True))


def _check_batch(batch: Mapping[str, Any]) -> None:
    if not isinstance(batch.get("input_ids"), Tensor) or batch["input_ids"].ndim != 2:
        raise ValueError("batch needs input_ids, an integer tensor [batch, tokens].")
    unknown = sorted(set(batch) - _KNOWN_KEYS)
    if unknown:
        raise ValueError(
            f"batch holds {', '.join(unknown)}, which cannot be cut into token chunks. Remove it; the rollout "
            f"takes {', '.join(sorted(_KNOWN_KEYS))}."
        )
    shape = batch["input_ids"].shape
    if shape[0] == 0 or shape[1] == 0:
        raise ValueError(f"batch['input_ids'] is empty: shape {tuple(shape)}.")
    for key, value in batch.items():
        fits = isinstance(value, Tensor) and value.ndim == 2 and value.shape[1] == shape[1]
        if not fits or value.shape[0] not in ({1, shape[0]} if key == "position_ids" else {shape[0]}):
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"batch['{key}'] is {got}; it must be a tensor of input_ids' shape {tuple(shape)}."
            )


def _positions(input_ids: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    return (mask.long().cumsum(dim=1) - 1).clamp_(min=0)
