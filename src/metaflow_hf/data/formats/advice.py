"""What to set for a dataset whose format is not certain, as far as its columns tell."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from metaflow_hf.data.formats.columns import EMPTY, MESSAGES, TEXT, TURNS, Column, Columns

# Columns whose name says that they answer another column, the most telling first.
_ANSWERS: Final = (
    "completion",
    "response",
    "answer",
    "output",
    "highlights",
    "summary",
    "solution",
    "target",
    "targets",
    "chosen",
    "answers",
)
_QUESTIONS: Final = (
    "instruction",
    "prompt",
    "question",
    "query",
    "input",
    "inputs",
    "problem",
    "source",
    "article",
    "document",
    "dialogue",
    "text",
    "content",
)
# Columns that say something about a row, and are not what it says.
_ABOUT: Final = frozenset(
    (
        *("category", "date", "domain", "dump", "ext", "file", "file_path", "filename", "flags", "hash"),
        *("hexsha", "id", "idx", "index", "intent", "lang", "language", "level", "license", "model"),
        *("name", "path", "source", "split", "subcategory", "subject", "subset", "system", "system_prompt"),
        *("task", "timestamp", "title", "tools", "topic", "type", "url", "uuid"),
    )
)
_OTHER_SHAPES: Final = frozenset({"lists", "lists of objects", "objects"})

Setting = tuple[str, Mapping[str, str]]


def listing(columns: Columns) -> str:
    """All columns with a value of each."""
    return f"Columns: {', '.join(map(str, columns.values()))}."


def advice(columns: Columns, found: Sequence[Setting]) -> str:
    """The settings that would be right; ``found`` are formats that the columns have."""
    chosen = sorted(found, key=lambda one: one[0] == "text")
    if all(name == "text" for name, _ in chosen):
        guessed = [one for one in guesses(columns) if one[0] != "text" or not chosen]
        chosen = guessed + chosen
    if chosen:
        return f"Set {', or '.join(_setting(one, columns) for one in chosen[:4])}."
    other = next((column.name for column in columns.values() if column.kind in _OTHER_SHAPES), None)
    if other is None:
        return "None of them holds text: name another dataset."
    return (
        f"No format reads column {other!r}: write what it says into a column 'messages' "
        '([{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]) or \'text\', or set data.format to '
        "module:attribute of a format of your own."
    )


def guesses(columns: Columns) -> list[Setting]:
    """Formats and columns that the names and the contents of the columns speak for."""
    for kind, name in ((MESSAGES, "messages"), (TURNS, "sharegpt")):
        if several := [column.name for column in columns.values() if column.kind == kind]:
            return [(name, {"messages": column}) for column in several]
    question, answer = question_column(columns), answer_column(columns)
    text = _text_column(columns)
    if question is None or answer is None or question == answer:
        return [] if text is None else [("text", {"text": text})]
    return [
        *_as_turns(columns, question, answer),
        ("text", {"text": text if text in {question, answer} else question}),
    ]


def _as_turns(columns: Columns, question: str, answer: str) -> list[Setting]:
    """The formats that keep everything that a question comes with."""
    directly: Setting = ("prompt_completion", {"prompt": question, "completion": answer})
    if "tools" in columns:
        return [directly]
    more = _more(columns, question, answer)
    turns: Setting = ("alpaca", {"instruction": question, **more, "output": answer})
    return [turns] if more or {"system", "system_prompt"} & columns.keys() else [turns, directly]


def question_column(columns: Columns) -> str | None:
    """The column that asks, by its name."""
    return _named(_QUESTIONS, columns)


def answer_column(columns: Columns) -> str | None:
    """The column that answers, by its name."""
    return _named(_ANSWERS, columns)


def _named(names: Iterable[str], columns: Columns) -> str | None:
    texts = {column.name.lower(): column.name for column in columns.values() if column.kind == TEXT}
    return next((texts[name] for name in names if name in texts), None)


def _more(columns: Columns, *taken: str) -> dict[str, str]:
    """What an instruction comes with."""
    for column in columns.values():
        if column.name.lower() in {"input", "context"} and column.name not in taken:
            return {"input": column.name} if column.kind in {TEXT, EMPTY} else {}
    return {}


def _text_column(columns: Columns) -> str | None:
    texts = [column for column in columns.values() if column.kind == TEXT]
    contents = [column for column in texts if not _is_about(column)]
    if not contents and any(column.kind in _OTHER_SHAPES for column in columns.values()):
        return None
    longest = max(contents or texts, key=lambda column: len(str(column.example)), default=None)
    return None if longest is None else longest.name


def _is_about(column: Column) -> bool:
    name = column.name.lower()
    return name in _ABOUT or name.endswith(("_id", "_url", "_path", "_name", "_hash"))


_MEANINGS: Final = {
    "alpaca": "as turns of the chat template",
    "prompt_completion": "the one directly behind the other",
    "text": "only this column, all of it",
}


def _setting(setting: Setting, columns: Columns) -> str:
    name, mapping = setting
    named = ", ".join(f"{role}: {column}" for role, column in mapping.items())
    meaning = _MEANINGS.get(name)
    if name == "prompt_completion" and "tools" in columns:
        meaning = "as turns of the chat template, with the tools"
    return f"data.format: {name} with data.columns: {{{named}}}{f' ({meaning})' if meaning else ''}"
