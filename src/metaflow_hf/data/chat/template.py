"""A tokenizer's chat template, called in the way in which it understands messages."""

import datetime as dt
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Final

from jinja2 import TemplateError

from metaflow_hf.data.chat.dates import with_date
from metaflow_hf.data.formats.examples import ASSISTANT, RowProblem

_MARKED: Final = re.compile(r"\{%-?\s*generation\s*-?%\}")
# What a template raises for messages that it does not expect.
_REFUSALS: Final = (TemplateError, TypeError, KeyError, ValueError, AttributeError, IndexError)
_ASKED, _ANSWERED = "probing question", "probing answer"
_PROBE: Final = [{"type": "function", "function": {"name": "probe", "arguments": {"key": _ANSWERED}}}]


class ChatTemplate:
    """The chat template of a transformers tokenizer.

    Some templates expect content as a string, some as a list of parts; some print the arguments of tool calls
    themselves, some expect them as JSON. Which, is found by rendering a short conversation. A template that prints
    the current date gets ``date`` instead (default: today's, as transformers has it).
    """

    def __init__(self, tokenizer: Any, *, date: dt.date | None = None) -> None:
        self.tokenizer = tokenizer
        self._date = date

    def __bool__(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    def source(self, tools: Sequence[Any] | None) -> str:
        """The text of the template that is used with these tools."""
        text: str = self.tokenizer.get_chat_template(tools=list(tools) if tools else None)
        return text

    def is_marked(self, tools: Sequence[Any] | None) -> bool:
        """Whether the template itself marks what the assistant says (``{% generation %}``)."""
        return bool(_MARKED.search(self.source(tools)))

    @cached_property
    def header(self) -> str:
        """What asks for a turn of the assistant after one of the user."""
        asked = [{"role": "user", "content": _parts(_ASKED) if self._wants_parts else _ASKED}]
        before, prompt = self._try(asked), self._try(asked, add_generation_prompt=True)
        return prompt.removeprefix(before) if prompt.startswith(before) else ""

    @cached_property
    def ends_turns(self) -> bool:
        """Whether anything is put behind what the assistant says."""
        return not self._try(self._dialog(_parts(_ANSWERED) if self._wants_parts else _ANSWERED)).endswith(
            _ANSWERED
        )

    @cached_property
    def end_token_id(self) -> int | None:
        """The special token right behind what the assistant says, at which a model stops; ``None`` without one."""
        text = self._try(self._dialog(_parts(_ANSWERED) if self._wants_parts else _ANSWERED))
        end = text.rpartition(_ANSWERED)[2].lstrip()
        token = max((one for one in self.special_tokens if end.startswith(one)), key=len, default=None)
        return None if token is None else int(self.tokenizer.get_added_vocab()[token])

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """The tokens that were added to the vocabulary, such as those around turns."""
        return tuple(map(str, self.tokenizer.get_added_vocab()))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        """The text of a conversation. Raises ``RowProblem`` for messages that the template refuses."""
        text: str = self.apply(messages, tools, tokenize=False, add_generation_prompt=add_generation_prompt)
        return text

    def apply(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, **options: Any
    ) -> Any:
        """``apply_chat_template`` of these messages. Raises ``RowProblem``."""
        written = [self._written(message) for message in messages]
        try:
            return self._apply(written, tools, **options)
        except _REFUSALS as error:
            raise RowProblem(
                f"the model's chat template refuses the first {len(messages)} messages: {error}",
                kind="refused by the chat template",
            ) from error

    def _apply(self, messages: list[Any], tools: Sequence[Any] | None, **options: Any) -> Any:
        if self._date is not None:
            options["chat_template"] = with_date(self.source(tools), self._date)
        return self.tokenizer.apply_chat_template(messages, tools=list(tools) if tools else None, **options)

    def _written(self, message: Mapping[str, Any]) -> dict[str, Any]:
        written = {key: value for key, value in message.items() if key != "weight"}
        if self._wants_parts:
            written["content"] = _parts(message["content"])
        if message.get("tool_calls") and self._wants_json_arguments:
            written["tool_calls"] = _with_json_arguments(message["tool_calls"])
        return written

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether a string as content is lost, and a list with a part of text is not."""
        return not self._says(_ANSWERED) and self._says(_parts(_ANSWERED))

    def _says(self, content: Any) -> bool:
        text = self._try(self._dialog(content))
        return _ASKED in text and _ANSWERED in text

    def _dialog(self, content: Any) -> list[Any]:
        asked = _ASKED if isinstance(content, str) else _parts(_ASKED)
        return [{"role": "user", "content": asked}, {"role": ASSISTANT, "content": content}]

    @cached_property
    def _wants_json_arguments(self) -> bool:
        """Whether arguments as an object are refused, and their JSON is not."""
        return not self._calls(_PROBE) and self._calls(_with_json_arguments(_PROBE))

    def _calls(self, calls: Sequence[Any]) -> bool:
        asked: dict[str, Any] = {"role": "user", "content": _ASKED}
        return _ANSWERED in self._try([asked, {"role": ASSISTANT, "content": "", "tool_calls": calls}])

    def _try(self, messages: list[Any], **options: Any) -> str:
        try:
            text: str = self._apply(messages, None, tokenize=False, **options)
        except _REFUSALS:
            return ""
        return text


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _with_json_arguments(calls: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            **call,
            "function": {
                **call["function"],
                "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
            },
        }
        for call in calls
    ]
