"""What the columns of a dataset hold, judged by some of its rows."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

TEXT: Final = "text"
MESSAGES: Final = "messages"
TURNS: Final = "turns with 'from' and 'value'"
TRANSLATIONS: Final = "translations"
MEDIA: Final = "binary files"
EMPTY: Final = "nothing"

_EXAMPLE_CHARACTERS: Final = 48


@dataclass(frozen=True, slots=True)
class Column:
    """A column: its name, what it holds, and one value that is not empty."""

    name: str
    kind: str
    example: Any = None

    def __str__(self) -> str:
        if self.kind == EMPTY:
            return f"{self.name} (empty)"
        shown = self.example if isinstance(self.example, str) else json.dumps(self.example, default=str)
        if len(shown) > _EXAMPLE_CHARACTERS:
            shown = shown[: _EXAMPLE_CHARACTERS - 1] + "…"
        return f"{self.name} ({self.kind}, e.g. {shown!r})"


Columns = Mapping[str, Column]


def describe_columns(rows: Iterable[Mapping[str, Any]]) -> dict[str, Column]:
    """The columns of these rows, in the order in which they are met.

    A column holds what most of its values are; empty values say nothing. A value of another kind is a bad row's.
    """
    kinds: dict[str, Counter[str]] = {}
    examples: dict[tuple[str, str], Any] = {}
    for row in rows:
        for name, value in row.items():
            kind = kind_of(value)
            kinds.setdefault(name, Counter())[kind] += kind != EMPTY
            examples.setdefault((name, kind), value)
    found = {}
    for name, counted in kinds.items():
        kind, number = counted.most_common(1)[0]
        kind = kind if number else EMPTY
        found[name] = Column(name, kind, examples.get((name, kind)))
    return found


def kind_of(value: Any) -> str:
    """What a value is; a string that holds messages as JSON counts as these messages."""
    if value is None or (isinstance(value, str | list | tuple | Mapping) and len(value) == 0):
        return EMPTY
    match value:
        case bool():
            return "truth values"
        case int() | float():
            return "numbers"
        case str():
            return _kind_of_text(value)
        case bytes() | bytearray():
            return MEDIA
        case list() | tuple():
            return _kind_of_list(value)
        case Mapping():
            return _kind_of_object(value)
    return type(value).__name__


def parsed_list(value: Any) -> Any:
    """The list that a JSON string holds; any other value as it is."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            found = json.loads(value)
        except ValueError:
            return value
        return found if isinstance(found, list) else value
    return value


def _kind_of_text(value: str) -> str:
    if not value.strip():
        return EMPTY
    found = parsed_list(value)
    kind = _kind_of_list(found) if isinstance(found, list) and found else TEXT
    return kind if kind in {MESSAGES, TURNS} else TEXT


def _kind_of_list(items: Any) -> str:
    if all(isinstance(item, Mapping) for item in items):
        if all("role" in item and ("content" in item or item.get("tool_calls")) for item in items):
            return MESSAGES
        if all("from" in item and "value" in item for item in items):
            return TURNS
        return "lists of objects"
    return "lists"


def _kind_of_object(value: Mapping[str, Any]) -> str:
    if {"bytes", "path"} <= value.keys() or {"array", "sampling_rate"} <= value.keys():
        return MEDIA
    languages = all(2 <= len(key) <= 7 and key.islower() for key in value)
    if len(value) > 1 and languages and all(isinstance(text, str) for text in value.values()):
        return TRANSLATIONS
    return "objects"
