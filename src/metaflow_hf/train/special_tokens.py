"""The tokens that begin, end and pad a text: the same in config.json, generation_config.json and tokenizer of an export.

What was trained decides: each document ends with ``end_token_ids``, so this is where generation stops. Follows transformers'
``align_special_tokens``, which its ``Trainer`` calls, and leaves out what cannot be right: an id that the tokenizer uses
for an ordinary token (generation would stop at a word) and one that the model has no embedding for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialTokens:
    """Ids, ``None`` where there is none. Generation stops at each of ``end_ids``; the first is the one of config.json."""

    end_ids: tuple[int, ...]
    bos_id: int | None
    pad_id: int | None

    @property
    def eos_token_id(self) -> int | list[int] | None:
        """``end_ids`` as generation_config.json has them: one id, a list of several, or ``None``."""
        return list(self.end_ids) if len(self.end_ids) > 1 else next(iter(self.end_ids), None)


def aligned_special_tokens(
    config: Any, generation_config: Any, tokenizer: Any, *, end_token_ids: Sequence[int] | None = None
) -> SpecialTokens:
    """The special tokens of a model that was trained with ``tokenizer``; changes none of its arguments.

    Args:
        config: Configuration of the (language) model.
        generation_config: Its generation configuration, or ``None``.
        tokenizer: The tokenizer, which has the last word where it defines a token.
        end_token_ids: What ends a document or a turn in training, most important first; by default the tokenizer's
            ``eos_token_id``. Other ends that the model came with are kept after them.

    """
    vocabulary = getattr(config, "vocab_size", None)
    ordinary = _OrdinaryTokens(tokenizer)

    def usable(token: Any) -> bool:
        return isinstance(token, int) and token >= 0 and (vocabulary is None or token < vocabulary)

    def kept(name: str) -> list[int]:
        known = [*_ids(generation_config, name), *_ids(config, name)]
        return [token for token in known if usable(token) and token not in ordinary]

    def one(name: str) -> int | None:
        own = getattr(tokenizer, name, None)
        return own if usable(own) else next(iter(kept(name)), None)

    trained = [tokenizer.eos_token_id] if end_token_ids is None else list(end_token_ids)
    ends = [*filter(usable, trained), *kept("eos_token_id")]
    return SpecialTokens(
        end_ids=tuple(dict.fromkeys(ends)), bos_id=one("bos_token_id"), pad_id=one("pad_token_id")
    )


def align_special_tokens(
    model: Any, tokenizer: Any, *, end_token_ids: Sequence[int] | None = None
) -> SpecialTokens:
    """Writes ``aligned_special_tokens`` into the configurations of ``model``, and returns them."""
    config, generation = model.config.get_text_config(decoder=True), getattr(model, "generation_config", None)
    tokens = aligned_special_tokens(config, generation, tokenizer, end_token_ids=end_token_ids)
    # An own list of several stays one: a single id would lose the others for readers of config.json.
    several = isinstance(getattr(config, "eos_token_id", None), list)
    config.eos_token_id = tokens.eos_token_id if several else next(iter(tokens.end_ids), None)
    config.bos_token_id, config.pad_token_id = tokens.bos_id, tokens.pad_id
    if generation is not None:
        generation.eos_token_id = tokens.eos_token_id
        generation.bos_token_id, generation.pad_token_id = tokens.bos_id, tokens.pad_id
    return tokens


class _OrdinaryTokens:
    """The ids of a tokenizer that stand for pieces of text, and begin or end none."""

    def __init__(self, tokenizer: Any) -> None:
        self._num_tokens = len(tokenizer)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._special = {
            *tokenizer.all_special_ids,
            *(number for number, token in added.items() if token.special),
        }

    def __contains__(self, token: int) -> bool:
        return token < self._num_tokens and token not in self._special


def _ids(settings: Any, name: str) -> list[Any]:
    value = getattr(settings, name, None)
    return list(value) if isinstance(value, (list, tuple)) else [value]
