"""Instructions as Stanford Alpaca writes them; the output carries the loss."""

from collections.abc import Mapping, Sequence
from typing import Any

from metaflow_hf.data.formats.columns import EMPTY, TEXT, parsed_list
from metaflow_hf.data.formats.examples import ASSISTANT, Example, Instruction, RowProblem
from metaflow_hf.data.formats.messages import SYSTEM
from metaflow_hf.data.formats.row_format import Role
from metaflow_hf.data.formats.text import text_of


class AlpacaFormat:
    """``{"instruction": "…", "input": "…", "output": "…"}``; the input may be missing or empty.

    A ``system`` prompt comes before it, and so do the earlier turns in ``history``, which are not learned.
    """

    name = "alpaca"
    roles: Sequence[Role] = (
        Role(name="output", names=("output",), kinds=(TEXT,)),
        Role(name="instruction", names=("instruction",), kinds=(TEXT,)),
        Role(name="input", names=("input",), kinds=(TEXT, EMPTY), is_required=False),
        SYSTEM,
        Role(name="history", names=("history",), kinds=("lists", EMPTY), is_required=False),
    )

    def example(self, row: Mapping[str, Any], columns: Mapping[str, str]) -> Example | None:
        output, instruction = text_of(row, columns["output"]), text_of(row, columns["instruction"])
        more = text_of(row, columns["input"]) if "input" in columns else None
        system = text_of(row, columns["system"]) if "system" in columns else None
        if output is None:
            return None
        if instruction is None and more is None:
            raise RowProblem(f"column {columns['instruction']!r} is empty, so nothing asks for the output")
        if instruction is None:
            instruction, more = more or "", None
        found = Instruction(instruction, output, more or "", system or "")
        earlier = _turns(row.get(columns["history"]), columns["history"]) if "history" in columns else []
        return found.as_conversation(earlier) if earlier else found


def _turns(history: Any, column: str) -> list[dict[str, str]]:
    """Earlier turns of a conversation: pairs of what was asked and answered."""
    turns = []
    for pair in parsed_list(history) or ():
        if (
            not isinstance(pair, Sequence)
            or len(pair) != 2
            or not all(isinstance(text, str) for text in pair)
        ):
            raise RowProblem(
                f"column {column!r} must hold pairs of a question and its answer, got {pair!r:.60}"
            )
        turns += [{"role": "user", "content": pair[0]}, {"role": ASSISTANT, "content": pair[1]}]
    return turns
