"""Conversations as ShareGPT writes them: turns with ``from`` and ``value``."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from metaflow_hf.data.formats.columns import TURNS, parsed_list
from metaflow_hf.data.formats.examples import ASSISTANT, Example, RowProblem
from metaflow_hf.data.formats.messages import SYSTEM, TOOLS, conversation, read_tool_calls, read_weight
from metaflow_hf.data.formats.row_format import Role

CALL: Final = "function_call"
SPEAKERS: Final = {
    "human": "user",
    "user": "user",
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "assistant": ASSISTANT,
    "model": ASSISTANT,
    "bing": ASSISTANT,
    "bard": ASSISTANT,
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    CALL: CALL,
    "tool_call": CALL,
}


class ShareGptFormat:
    """``{"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}``."""

    name = "sharegpt"
    roles: Sequence[Role] = (
        Role(
            name="messages",
            names=("conversations", "conversation", "messages"),
            kinds=(TURNS,),
            any_name=True,
        ),
        SYSTEM,
        TOOLS,
    )

    def example(self, row: Mapping[str, Any], columns: Mapping[str, str]) -> Example | None:
        column = columns["messages"]
        turns = parsed_list(row.get(column))
        if not turns:
            return None
        if not isinstance(turns, Sequence) or isinstance(turns, str):
            raise RowProblem(f"column {column!r} holds {type(turns).__name__} instead of a list of turns")
        messages = [
            _message(turn, f"turn {number} of column {column!r}") for number, turn in enumerate(turns, 1)
        ]
        return conversation(messages, row, columns)


def _message(turn: Any, where: str) -> dict[str, Any]:
    if not isinstance(turn, Mapping) or not isinstance(turn.get("from"), str):
        raise RowProblem(f"{where} must be an object with 'from' and 'value', got {turn!r:.60}")
    role = SPEAKERS.get(turn["from"].lower())
    if role is None:
        raise RowProblem(f"{where} is from {turn['from']!r}; known are {', '.join(SPEAKERS)}")
    value = turn.get("value")
    weight = read_weight(turn, where)
    if role == CALL:
        calls = read_tool_calls(_call(value, where), where)
        return {"role": ASSISTANT, "content": "", "tool_calls": calls, **weight}
    if value is not None and not isinstance(value, str):
        if role != "tool":
            raise RowProblem(f"{where} has a value of type {type(value).__name__} instead of text")
        value = json.dumps(value, ensure_ascii=False)
    return {"role": role, "content": value or "", **weight}


def _call(value: Any, where: str) -> Any:
    """One call or a list of calls, as JSON or as an object."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise RowProblem(f"{where} must hold a call as JSON, got {value!r:.60}") from error
