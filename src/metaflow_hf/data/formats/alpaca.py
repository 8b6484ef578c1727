"""Instructions as Stanford Alpaca writes them; the output carries the loss."""

from collections.abc import Mapping, Sequence
from typing import Any

from metaflow_hf.data.formats.columns import EMPTY, TEXT
from metaflow_hf.data.formats.examples import Example, Instruction, RowProblem
from metaflow_hf.data.formats.row_format import Role
from metaflow_hf.data.formats.text import text_of


class AlpacaFormat:
    """``{"instruction": "…", "input": "…", "output": "…"}``; the input may be missing or empty."""

    name = "alpaca"
    roles: Sequence[Role] = (
        Role(name="output", names=("output",), kinds=(TEXT,)),
        Role(name="instruction", names=("instruction",), kinds=(TEXT,)),
        Role(name="input", names=("input",), kinds=(TEXT, EMPTY), is_required=False),
    )

    def example(self, row: Mapping[str, Any], columns: Mapping[str, str]) -> Example | None:
        output, instruction = text_of(row, columns["output"]), text_of(row, columns["instruction"])
        more = text_of(row, columns["input"]) if "input" in columns else None
        if output is None:
            return None
        if instruction is None and more is None:
            raise RowProblem(f"column {columns['instruction']!r} is empty, so nothing asks for the output")
        if instruction is None:
            return Instruction(more or "", output)
        return Instruction(instruction, output, more or "")
