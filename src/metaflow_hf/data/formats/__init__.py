"""From a row to what it says: which format a dataset has, and which of its columns are trained.

Read ``examples`` (what a row can say), then ``detection`` (how a format is recognized), then one format, such as
``alpaca``. A format of your own is one object with the members of ``RowFormat``, given to ``register_format``.
"""

from metaflow_hf.data.formats.detection import DetectedFormat, detect_format, parse_columns, resolve_format
from metaflow_hf.data.formats.examples import Conversation, Example, Instruction, PromptCompletion, RowProblem
from metaflow_hf.data.formats.registry import known_formats, register_format
from metaflow_hf.data.formats.row_format import Role, RowFormat

__all__ = [
    "Conversation",
    "DetectedFormat",
    "Example",
    "Instruction",
    "PromptCompletion",
    "Role",
    "RowFormat",
    "RowProblem",
    "detect_format",
    "known_formats",
    "parse_columns",
    "register_format",
    "resolve_format",
]
