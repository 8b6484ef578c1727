"""Conversations -> tokens, with labels only where the assistant speaks.

The assistant's words are found by rendering the conversation up to each turn: what a turn adds to the rendered
text is the turn. That works for every template that only appends, and needs no ``{% generation %}`` marks in
it; a template that rewrites earlier turns is refused instead of training on the wrong words.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from metaflow_hf.errors import BadRowError

IGNORE_INDEX = -100


def encode_conversation(
    messages: Sequence[Any], tokenizer: Any, *, loss_on: Literal["assistant", "all"], row: int
) -> tuple[list[int], list[int]]:
    """``(input_ids, labels)`` of a list of ``{"role", "content"}`` messages by the tokenizer's chat template.

    Raises ``BadRowError`` naming ``row`` for messages that are none, a tokenizer without a chat template, and,
    when only the assistant's words shall count, a template that does not only append.
    """
    if not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages):
        raise BadRowError(f"row {row}: a conversation is a list of objects with 'role' and 'content'.")
    if not getattr(tokenizer, "chat_template", None):
        raise BadRowError(
            f"row {row} is a conversation, but the tokenizer of this model has no chat template: choose a model "
            "with one, or a text column."
        )
    rendered = _render(messages, tokenizer, row=row)
    if loss_on == "all":
        ids: list[int] = tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"]
        return ids, ids
    spans = list(_assistant_spans(messages, rendered, tokenizer, row=row))
    encoded = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = encoded["input_ids"]
    labels = [
        token if any(start < end and start < stop and begin < end for begin, stop in spans) else IGNORE_INDEX
        for token, (start, end) in zip(ids, encoded["offset_mapping"], strict=True)
    ]
    return ids, labels


def as_text(value: Any, tokenizer: Any, *, row: int) -> str:
    """The text of one value of a text column: itself, a conversation as its template renders it, or ""."""
    if isinstance(value, list):
        return _render(value, tokenizer, row=row)
    return str(value or "")


def _assistant_spans(
    messages: Sequence[Any], rendered: str, tokenizer: Any, *, row: int
) -> Iterator[tuple[int, int]]:
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(messages[:number], tokenizer, row=row, add_generation_prompt=True)
        upto = _render(messages[: number + 1], tokenizer, row=row)
        if not (rendered.startswith(upto) and upto.startswith(before)):
            raise BadRowError(
                f"row {row}: the chat template changes earlier turns when later ones follow, so the assistant's "
                "words cannot be told apart: use loss_on='all'."
            )
        yield len(before), len(upto)


def _render(messages: Sequence[Any], tokenizer: Any, *, row: int, add_generation_prompt: bool = False) -> str:
    from jinja2 import TemplateError

    try:
        rendered: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except (TemplateError, TypeError, KeyError) as error:
        raise BadRowError(
            f"row {row}: the model's chat template refuses the first {len(messages)} messages: {error}."
        ) from error
    return rendered
