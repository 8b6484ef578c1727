"""Which column of a dataset holds the text: found by name and type, or named by the user."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from metaflow_hf.errors import ConfigError

# In order of preference.
TEXT_COLUMNS: Final = ("text", "content", "sentence", "document", "article", "body", "input", "output")
CHAT_COLUMNS: Final = ("messages", "conversations", "conversation")


def find_text_column(rows: Sequence[Mapping[str, Any]], *, named: str | None, where: str) -> str:
    """The text column of a dataset, judged by its first ``rows``.

    ``named`` must exist and hold text or conversations; without it the usual names are tried (text, content, …,
    messages), then a single column of text. Raises ``ConfigError`` that lists the columns with their types.
    """
    kinds = _kinds(rows)
    listing = ", ".join(f"{name} ({kind})" for name, kind in kinds.items()) or "none"
    if named is not None:
        if named not in kinds:
            raise ConfigError(f"{where} has no column {named!r}. Its columns: {listing}.")
        if kinds[named] not in ("text", "messages", "null"):
            raise ConfigError(
                f"{where}: column {named!r} holds {kinds[named]}, not text. Its columns: {listing}."
            )
        return named
    for candidates, wanted in ((TEXT_COLUMNS, "text"), (CHAT_COLUMNS, "messages")):
        for name in candidates:
            if kinds.get(name) == wanted:
                return name
    texts = [name for name, kind in kinds.items() if kind == "text"]
    if len(texts) == 1:
        return texts[0]
    raise ConfigError(f"{where}: which column is the text? Name it as text_column. Its columns: {listing}.")


def _kinds(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    kinds: dict[str, str] = {}
    for row in rows:
        for name, value in row.items():
            if kinds.get(name, "null") == "null":
                kinds[name] = _kind(value)
    return kinds


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        return "text"
    if isinstance(value, list) and value and all(isinstance(m, dict) and "role" in m for m in value):
        return "messages"
    return {bool: "truth values", int: "numbers", float: "numbers", list: "lists", dict: "objects"}.get(
        type(value), type(value).__name__
    )
