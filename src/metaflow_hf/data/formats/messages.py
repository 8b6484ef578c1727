"""Conversations as OpenAI's API writes them: messages with a role and content.

Every conversation leaves here in one form: roles that chat templates know, content as a string, tool calls and
their arguments as objects, and no keys without a value (tables fill them in for rows that lack them).
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from metaflow_hf.data.formats.columns import EMPTY, MESSAGES, TEXT, parsed_list
from metaflow_hf.data.formats.examples import ASSISTANT, Conversation, Example, RowProblem
from metaflow_hf.data.formats.row_format import Role
from metaflow_hf.data.formats.text import text_of

TOOLS: Final = Role(
    name="tools",
    names=("tools",),
    kinds=("lists of objects", "lists", TEXT, "objects", EMPTY),
    is_required=False,
)
# The first rows may well have none.
SYSTEM: Final = Role(name="system", names=("system", "system_prompt"), kinds=(TEXT, EMPTY), is_required=False)
_ROLES: Final = frozenset(
    {"system", "developer", "user", ASSISTANT, "tool", "function", "ipython", "context", "documents"}
)
_OTHER_NAMES: Final = {
    "human": "user",
    "gpt": ASSISTANT,
    "model": ASSISTANT,
    "bot": ASSISTANT,
    "chatbot": ASSISTANT,
}


class MessagesFormat:
    """``{"messages": [{"role": "user", "content": "…"}, …], "tools": […]}``."""

    name = "messages"
    roles: Sequence[Role] = (
        Role(
            name="messages",
            names=("messages", "conversations", "conversation"),
            kinds=(MESSAGES,),
            any_name=True,
        ),
        SYSTEM,
        TOOLS,
    )

    def example(self, row: Mapping[str, Any], columns: Mapping[str, str]) -> Example | None:
        column = columns["messages"]
        items = parsed_list(row.get(column))
        if not items:
            return None
        return conversation(read_messages(items, column), row, columns)


def conversation(
    messages: list[dict[str, Any]], row: Mapping[str, Any], columns: Mapping[str, str]
) -> Conversation:
    """The messages with the system prompt and the tools of their row; one that they begin with counts before a column's.

    Raises ``RowProblem``.
    """
    system = text_of(row, columns["system"]) if "system" in columns else None
    if system is not None and messages[0]["role"] not in {"system", "developer"}:
        messages = [{"role": "system", "content": system}, *messages]
    return Conversation(messages, read_tools(row.get(columns["tools"])) if "tools" in columns else None)


def read_messages(items: Any, column: str) -> list[dict[str, Any]]:
    """Messages in the form that chat templates expect. Raises ``RowProblem``."""
    if not isinstance(items, Sequence) or isinstance(items, str):
        raise RowProblem(f"column {column!r} holds {type(items).__name__} instead of a list of messages")
    return [_message(item, f"message {number} of column {column!r}") for number, item in enumerate(items, 1)]


def _message(item: Any, where: str) -> dict[str, Any]:
    if not isinstance(item, Mapping) or not isinstance(item.get("role"), str):
        raise RowProblem(f"{where} must be an object with 'role' and 'content', got {_shown(item)}")
    role = item["role"].lower()
    role = _OTHER_NAMES.get(role, role)
    if role not in _ROLES:
        raise RowProblem(
            f"{where} has the role {item['role']!r}; known are {', '.join(sorted(_ROLES | _OTHER_NAMES.keys()))}"
        )
    message = {key: value for key, value in item.items() if value is not None}
    message["role"] = role
    message["content"] = _text_of_content(item.get("content"), where)
    message |= read_weight(item, where)
    if calls := _parsed(item.get("tool_calls")):
        message["tool_calls"] = read_tool_calls(calls, where)
    else:
        message.pop("tool_calls", None)
    return message


def read_weight(item: Mapping[str, Any], where: str) -> dict[str, int]:
    """Whether a message is learned: ``{"weight": 0}`` where it is not, nothing where that is not said."""
    weight = item.get("weight")
    if weight is None:
        return {}
    if weight not in (0, 1) or isinstance(weight, str):
        raise RowProblem(f"{where} has the weight {weight!r}, which must be 0 (not learned) or 1")
    return {"weight": int(weight)}


def _text_of_content(content: Any, where: str) -> str:
    """The text of ``content``; parts of text are joined."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, Sequence):
        return "".join(_text_of_part(part, where) for part in content)
    if isinstance(content, Mapping):
        return _text_of_part(content, where)
    raise RowProblem(f"{where} has content of type {type(content).__name__} instead of text")


def _text_of_part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        media = sorted(
            key for key in ("image", "image_url", "audio", "video", "input_audio") if part.get(key)
        )
        if part.get("type", "text") in {"text", "input_text", "output_text"} and not media:
            return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else None
    raise RowProblem(f"{where} has a part of type {kind!r}, got {_shown(part)}: only text is trained")


def read_tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects, however they were encoded. Raises ``RowProblem``."""
    if isinstance(calls, Mapping):
        calls = [calls]
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise RowProblem(f"{where}: tool_calls must be a list, got {_shown(calls)}")
    return [_tool_call(call, where) for call in calls]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    call = _parsed(call)
    function = _parsed(call.get("function")) if isinstance(call, Mapping) else None
    called = function if isinstance(function, Mapping) else call
    if not isinstance(called, Mapping) or not isinstance(called.get("name"), str):
        raise RowProblem(f"{where}: a tool call must have a name, got {_shown(call)}")
    arguments = _parsed(called.get("arguments", called.get("parameters")))
    if arguments is not None and not isinstance(arguments, Mapping):
        raise RowProblem(
            f"{where}: the arguments of {called['name']!r} must be an object or its JSON, got {_shown(arguments)}"
        )
    arguments = {} if arguments is None else arguments
    if not isinstance(function, Mapping):
        return {"type": "function", "function": {"name": called["name"], "arguments": arguments}}
    # Templates print calls as JSON: the order of the keys is a part of it.
    given = {key: value for key, value in call.items() if value is not None}
    named = {key: value for key, value in function.items() if value is not None}
    return {
        **({} if "type" in given else {"type": "function"}),
        **given,
        "function": {**named, "arguments": arguments},
    }


def read_tools(value: Any) -> list[Any] | None:
    """The tools of a row: a list, or JSON of it, or of each of them. Raises ``RowProblem``."""
    tools = _parsed(value)
    if not tools:
        return None
    if isinstance(tools, Mapping):
        tools = [tools]
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise RowProblem(f"tools must be a list of JSON schemas, got {_shown(value)}")
    read = [_parsed(tool) for tool in tools]
    for tool in read:
        if not isinstance(tool, Mapping):
            raise RowProblem(f"tools must be a list of JSON schemas, got {_shown(tool)} among them")
    return read


def _parsed(value: Any) -> Any:
    """What a string of JSON holds, ``None`` for a blank one; other values, and other strings, as they are."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text[:1] in {"{", "["}:
        try:
            return json.loads(text)
        except ValueError:
            return value
    return None if text in {"", "null"} else value


def _shown(value: Any) -> str:
    return f"{value!r:.60}"
