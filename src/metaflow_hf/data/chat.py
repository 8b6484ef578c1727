"""Conversations -> the text of their chat template, and which of it the assistant says.

A template with ``{% generation %}`` marks says so itself. For any other the assistant's words are found by
rendering the conversation up to each turn: what a turn adds to the rendered text is the turn. That is right for
every template that only appends; one that rewrites earlier turns is refused instead of training on the wrong words.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from metaflow_hf.errors import BadRowError

ASSISTANT: Final = "assistant"
TOOLS_COLUMN: Final = "tools"
_MARKED: Final = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True)
class Conversation:
    """``messages`` with ``role``, ``content`` and whatever else the chat template knows (``tool_calls``, …), and
    the ``tools`` on offer, as JSON schemas.
    """

    messages: Sequence[Any]
    tools: Sequence[Any] | None = None

    @classmethod
    def of_row(cls, messages: Sequence[Any], row: Mapping[str, Any]) -> "Conversation":
        """The conversation in a row; a column ``tools`` (a list, or that list as JSON text) goes with it."""
        tools = row.get(TOOLS_COLUMN)
        if isinstance(tools, str):
            try:
                tools = json.loads(tools)
            except ValueError:
                tools = None
        return cls(messages, tools if isinstance(tools, list) and tools else None)


@dataclass(frozen=True, slots=True)
class Transcript:
    """A rendered conversation: ``text``, and the spans of characters ``[start, stop)`` that the assistant says."""

    text: str
    spoken: tuple[tuple[int, int], ...]

    @property
    def spoken_text(self) -> str:
        """What the assistant says, with the template's own ends of turns."""
        return "".join(self.text[start:stop] for start, stop in self.spoken)

    def is_spoken(self, start: int, stop: int) -> bool:
        """Whether a token at characters ``[start, stop)`` belongs, at least in part, to what the assistant says.

        Some tokenizers leave whitespace out of offsets: a token of nothing else lies at the end of its whitespace.
        """
        if start < stop:
            return any(start < end and begin < stop for begin, end in self.spoken)
        return any(begin < start <= end for begin, end in self.spoken)


def transcribe(conversation: Conversation, tokenizer: Any, *, find_spoken: bool, row: str) -> Transcript:
    """The conversation by the tokenizer's chat template; ``row`` names it in errors.

    Raises ``BadRowError`` for messages that are none, a tokenizer without a chat template, messages that the template
    refuses, and, with ``find_spoken``, for a template that leaves unclear what the assistant says.
    """
    messages = conversation.messages
    if not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages):
        raise BadRowError(f"{row}: a conversation is a list of objects with 'role' and 'content'.")
    if not getattr(tokenizer, "chat_template", None):
        raise BadRowError(
            f"{row} is a conversation, but the tokenizer of this model has no chat template: choose a model "
            "with one, or a text column."
        )
    text: str = _render(conversation, len(messages), tokenizer, row=row)
    if not find_spoken:
        return Transcript(text, ())
    if not getattr(tokenizer, "is_fast", False):
        raise BadRowError(
            f"{row}: {type(tokenizer).__name__} does not tell which characters a token stands for, so the assistant's "
            "words cannot be told apart: use data.loss_on: all, or a model with a fast tokenizer."
        )
    if _MARKED.search(tokenizer.get_chat_template(tools=conversation.tools)):
        return Transcript(text, tuple(_marked_spans(conversation, tokenizer, row=row)))
    return Transcript(text, tuple(_added_spans(conversation, text, tokenizer, row=row)))


def _added_spans(
    conversation: Conversation, text: str, tokenizer: Any, *, row: str
) -> Iterator[tuple[int, int]]:
    """What each turn of the assistant adds after the prompt for it."""
    for number, message in enumerate(conversation.messages):
        if message["role"] != ASSISTANT:
            continue
        upto = _render(conversation, number + 1, tokenizer, row=row)
        prompt = _prompt(conversation, number, upto, tokenizer, row=row)
        if not (text.startswith(upto) and upto.startswith(prompt)):
            so_far = _render(conversation, number, tokenizer, row=row) if number else ""
            raise _unclear(number + 1, appends=text.startswith(upto) and upto.startswith(so_far), row=row)
        yield len(prompt), len(upto)


def _unclear(number: int, *, appends: bool, row: str) -> BadRowError:
    reason = (
        f"begins message {number} in another way than it asks for it"
        if appends
        else f"changes earlier turns when later ones follow (around message {number})"
    )
    return BadRowError(
        f"{row}: the model's chat template {reason}, so the assistant's words cannot be told apart: cut the row into "
        "one conversation per turn of the assistant, take a template with {% generation %} marks, or set "
        "data.loss_on: all."
    )


def _prompt(conversation: Conversation, number: int, upto: str, tokenizer: Any, *, row: str) -> str:
    """The text before the words of message ``number``, its header included."""
    if number > 0:
        return _render(conversation, number, tokenizer, row=row, add_generation_prompt=True)
    # Nothing comes before it, and no template renders nothing: the header is what is asked with after it.
    header = _render(conversation, 1, tokenizer, row=row, add_generation_prompt=True)[len(upto) :]
    return upto[: upto.find(header) + len(header)] if header in upto else ""


def _marked_spans(conversation: Conversation, tokenizer: Any, *, row: str) -> Iterator[tuple[int, int]]:
    """The runs of tokens that lie between the template's own marks."""
    encoded = _apply(
        conversation,
        len(conversation.messages),
        tokenizer,
        row=row,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"return_offsets_mapping": True},
    )
    run: tuple[int, int] | None = None
    for (start, stop), is_spoken in zip(encoded["offset_mapping"], encoded["assistant_masks"], strict=True):
        if is_spoken:
            run = (start if run is None else run[0], stop)
        elif run is not None:
            yield run
            run = None
    if run is not None:
        yield run


def _render(
    conversation: Conversation, count: int, tokenizer: Any, *, row: str, add_generation_prompt: bool = False
) -> str:
    rendered: str = _apply(
        conversation, count, tokenizer, row=row, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    return rendered


def _apply(conversation: Conversation, count: int, tokenizer: Any, *, row: str, **options: Any) -> Any:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            list(conversation.messages[:count]), tools=conversation.tools, **options
        )
    except (TemplateError, TypeError, KeyError, ValueError) as error:
        raise BadRowError(
            f"{row}: the model's chat template refuses the first {count} messages: {error}."
        ) from error
