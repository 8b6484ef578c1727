"""A prompt and its completion, as texts or as messages; the completion carries the loss.

Beside a column of system prompts or of tools, texts are turns of a conversation too, and the JSON of a list of calls
is calls of the tools.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from metaflow_hf.data.formats.columns import EMPTY, MESSAGES, TEXT, parsed_list
from metaflow_hf.data.formats.examples import ASSISTANT, Conversation, Example, PromptCompletion, RowProblem
from metaflow_hf.data.formats.messages import SYSTEM, TOOLS, conversation, read_messages
from metaflow_hf.data.formats.row_format import Role


class PromptCompletionFormat:
    """``{"prompt": "The sky is", "completion": " blue."}``, each of them also a list of messages."""

    name = "prompt_completion"
    roles: Sequence[Role] = (
        Role(name="completion", names=("completion",), kinds=(TEXT, MESSAGES)),
        Role(name="prompt", names=("prompt",), kinds=(TEXT, MESSAGES, EMPTY)),
        SYSTEM,
        TOOLS,
    )

    def example(self, row: Mapping[str, Any], columns: Mapping[str, str]) -> Example | None:
        prompt, completion = (_value(row, columns[role]) for role in ("prompt", "completion"))
        if not completion or (isinstance(completion, str) and not completion.strip()):
            return None
        is_text = isinstance(completion, str) and (isinstance(prompt, str) or not prompt)
        if is_text and not columns.keys() & {"system", "tools"}:
            return PromptCompletion(prompt or "", completion)
        if isinstance(completion, str):
            completion = [_answer(completion, columns)]
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        asked = read_messages(prompt or [], columns["prompt"])
        answered = read_messages(completion, columns["completion"])
        whole = conversation([*asked, *answered], row, columns)
        return Conversation(whole.messages, whole.tools, learned_from=len(whole.messages) - len(answered))


def _answer(completion: str, columns: Mapping[str, str]) -> dict[str, Any]:
    calls = parsed_list(completion) if "tools" in columns else None
    if isinstance(calls, list) and calls and all(_is_call(call) for call in calls):
        return {"role": ASSISTANT, "content": None, "tool_calls": calls}
    return {"role": ASSISTANT, "content": completion}


def _is_call(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("name"), str) and "arguments" in value


def _value(row: Mapping[str, Any], column: str) -> Any:
    value = row.get(column)
    found = parsed_list(value)
    if isinstance(found, list) and isinstance(value, str):
        # A text that is a list of something else than messages stays a text.
        found = found if all(isinstance(item, Mapping) and "role" in item for item in found) else value
    if found is not None and not isinstance(found, str | Sequence):
        raise RowProblem(f"column {column!r} holds {type(found).__name__} instead of text or messages")
    return found
