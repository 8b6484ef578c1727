"""Whether a turn is in what a chat template made of it, word by word."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from metaflow_hf.data.formats.examples import ASSISTANT, RowProblem

_THOUGHTS_IN_CONTENT: Final = re.compile(r"^.*</think>", re.DOTALL)
_SHOWN: Final = 60
# The keys under which messages hold what the assistant thinks before it answers.
THOUGHTS: Final = ("reasoning_content", "reasoning", "thinking")


def check_turn(message: Mapping[str, Any], said: str, number: int) -> bool:
    """Raises ``RowProblem`` unless ``said`` holds the content and the tool calls of message ``number`` (from 0).

    Space around the content may be gone, and thoughts: some templates keep those of the last turn only, or none.
    Returns whether all thoughts are there.
    """
    content = message["content"].strip()
    answer = _THOUGHTS_IN_CONTENT.sub("", content).strip()
    if content not in said and (answer == content or answer not in said):
        raise _left_out(number, "content", content)
    for call in message.get("tool_calls") or ():
        function = call["function"]
        if function["name"] not in said:
            raise _left_out(number, "call of the tool", function["name"])
        for leaf in _leaves(function["arguments"]):
            if not any(form in said for form in _written(leaf)):
                raise _left_out(number, f"argument of the tool {function['name']!r},", str(leaf))
    thoughts = [str(message.get(key) or "").strip() for key in THOUGHTS]
    return content in said and all(thought in said for thought in thoughts)


def missing_prompt(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, text: str
) -> str | None:
    """What a template leaves out of what comes before an answer: ``the tools``, or a message by its number and role.

    ``messages`` are those before the answer, ``text`` is what the template rendered for them and it.
    """
    names = [str(tool.get("function", tool).get("name", "")) for tool in tools or ()]
    if names and not any(name in text for name in names):
        return "the tools"
    for number, message in enumerate(messages, 1):
        content = message["content"].strip()
        if message["role"] != ASSISTANT and not any(form in text for form in _written(content)):
            return f"message {number} (of the {message['role']})"
    return None


def _left_out(number: int, what: str, text: str) -> RowProblem:
    shown = text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
    return RowProblem(
        f"the model's chat template leaves out or changes the {what} {shown!r} of message {number + 1} (of the "
        "assistant): take a model whose template knows it, or set data.chat_template",
        kind="left out by the chat template",
    )


def _leaves(value: Any) -> Iterator[Any]:
    """The names and the values in arguments."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _written(leaf: Any) -> Iterator[str]:
    """The ways in which templates write a value."""
    yield str(leaf)
    for ensure_ascii in (False, True):
        text = json.dumps(leaf, ensure_ascii=ensure_ascii, default=str)
        yield text[1:-1] if isinstance(leaf, str) else text
    yield repr(leaf)[1:-1] if isinstance(leaf, str) else repr(leaf)
