"""Which format the rows of a dataset have, and which columns play its roles: certain, or refused with what to set."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final

from metaflow_hf.data.formats.columns import EMPTY, MESSAGES, TEXT, TURNS, Column, Columns, describe_columns
from metaflow_hf.data.formats.examples import Example
from metaflow_hf.data.formats.refused import refused_kind
from metaflow_hf.data.formats.registry import AUTO, find_format, known_formats
from metaflow_hf.data.formats.row_format import RowFormat, complete, match_roles
from metaflow_hf.errors import ConfigError, FormatError

DETECTED_ROWS: Final = 100
# Columns whose name says that they answer another column.
_ANSWERS: Final = (
    "completion",
    "response",
    "answer",
    "output",
    "highlights",
    "summary",
    "target",
    "chosen",
    "answers",
)
_QUESTIONS: Final = (
    "instruction",
    "prompt",
    "question",
    "query",
    "input",
    "problem",
    "source",
    "article",
    "document",
)


@dataclass(frozen=True, slots=True)
class DetectedFormat:
    """A format by ``name``, and the column that plays each of its roles (role -> column name)."""

    name: str
    columns: Mapping[str, str] = field(default_factory=dict)

    @property
    def main_column(self) -> str:
        """The column of the first role: a row without a value there is blank."""
        return self.columns[find_format(self.name).roles[0].name]

    def example(self, row: Mapping[str, Any]) -> Example | None:
        """What a row says, ``None`` for a blank row. Raises ``RowProblem`` for one that cannot be used."""
        return find_format(self.name).example(row, self.columns)

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(f'{role}: {column}' for role, column in self.columns.items())})"


def detect_format(
    rows: Iterable[Mapping[str, Any]],
    *,
    format: str = AUTO,  # noqa: A002  the name of the setting
    columns: Mapping[str, str] | None = None,
    where: str = "",
) -> DetectedFormat:
    """The format of the first 100 of these rows. ``auto`` decides only when it is certain.

    Args:
        rows: Rows as ``open_rows`` gives them.
        format: ``auto``, the name of a format, or ``module:attribute`` of a format of your own.
        columns: Role -> column name, for columns that are not named as usual.
        where: What the rows are of, for messages.

    Raises:
        FormatError: when the format is not certain, or a column does not exist or holds something else. The message
            names the columns and the settings that decide.

    """
    known = describe_columns(islice(rows, DETECTED_ROWS))
    place = f"{where}: " if where else ""
    if not known:
        raise FormatError(f"{place}there are no rows, so no format can be told.")
    named = dict(columns or {})
    _check_exist(named, known, place)
    if format != AUTO:
        return _checked(find_format(format), named, known, place)
    if named:
        return _by_roles(named, known, place)
    candidates = _matching(known, by_name=True)
    has_text = any(one.name != "text" or one.columns["text"] == "text" for one in candidates)
    if (refusal := refused_kind(known, has_text=has_text)) is not None:
        raise FormatError(f"{place}{refusal} {_listing(known)}")
    return _certain(known, place)


def parse_columns(text: str) -> dict[str, str]:
    """``prompt=question,completion=answer`` as role -> column. Raises ``ConfigError`` for text of another form."""
    named: dict[str, str] = {}
    for pair in filter(None, text.split(",")):
        role, equals, column = pair.partition("=")
        if not equals or not role.strip() or not column.strip():
            raise ConfigError(f"columns must be like prompt=question,completion=answer, got {text!r}.")
        named[role.strip()] = column.strip()
    return named


def resolve_format(
    rows: Iterable[Mapping[str, Any]],
    *,
    format: str = AUTO,  # noqa: A002  the name of the setting
    columns: Mapping[str, str] | None = None,
    text_column: str | None = None,
    where: str = "",
) -> DetectedFormat:
    """As ``detect_format``; ``text_column`` names the column of a format with one: its texts, or its conversations.

    Raises ``ConfigError`` for a text column beside ``columns``.
    """
    if text_column is None:
        return detect_format(rows, format=format, columns=columns, where=where)
    if columns:
        raise ConfigError(
            f"text_column: {text_column} and columns both say which columns are trained: keep one of them."
        )
    rows = list(islice(rows, DETECTED_ROWS))
    known = describe_columns(rows)
    kind = known[text_column].kind if text_column in known else TEXT
    role = "messages" if kind in {MESSAGES, TURNS} else "text"
    name = format if format != AUTO or role != "text" else "text"
    return detect_format(rows, format=name, columns={role: text_column}, where=where)


def _certain(columns: Columns, place: str) -> DetectedFormat:
    found = _matching(columns, by_name=True)
    if not any(one.name != "text" for one in found):
        # A column of messages is one whatever its name, unless it is a part of something else.
        found += [one for one in _matching(columns, by_name=False) if one.name != "text"]
    structured = [one for one in found if one.name != "text"]
    texts = [one for one in found if one.name == "text"]
    if len(structured) == 1 and not texts:
        return structured[0]
    if len(structured) == 1 and _is_rendering(columns, structured[0], texts):
        return structured[0]
    if not found and "text" in columns and columns["text"].kind == EMPTY:
        return DetectedFormat("text", {"text": "text"})
    if not structured and _is_text(columns, texts):
        return DetectedFormat("text", {"text": "text"}) if "text" in columns else texts[0]
    raise FormatError(
        f"{place}which columns are trained is not certain. {_listing(columns)} {_advice(columns, found)}"
    )


def _matching(columns: Columns, *, by_name: bool) -> list[DetectedFormat]:
    return [
        DetectedFormat(name, mapping)
        for name, form in known_formats().items()
        for mapping in match_roles(form, columns, by_name=by_name)
    ]


def _is_text(columns: Columns, texts: list[DetectedFormat]) -> bool:
    """Whether one column is the text beyond doubt: it is named ``text``, or as texts are and nothing answers it."""
    if any(one.columns["text"] == "text" for one in texts):
        return True
    answered = any(name in columns and columns[name].kind == TEXT for name in _ANSWERS)
    return len(texts) == 1 and not answered


def _is_rendering(columns: Columns, structured: DetectedFormat, texts: list[DetectedFormat]) -> bool:
    """Whether the only text beside instructions is nothing but their rendering, as in the first Alpaca dataset."""
    if structured.name != "alpaca" or len(texts) != 1:
        return False
    whole = str(columns[texts[0].columns["text"]].example)
    parts = [str(columns[structured.columns[role]].example) for role in ("instruction", "output")]
    return all(part in whole for part in parts)


def _by_roles(named: Mapping[str, str], columns: Columns, place: str) -> DetectedFormat:
    """The only format that has these roles, and whose other required columns are there."""
    fitting = []
    for form in known_formats().values():
        roles = {role.name: role for role in form.roles}
        if not named.keys() <= roles.keys():
            continue
        whole = complete(form, named, columns)
        missing = [role.name for role in form.roles if role.is_required and role.name not in whole]
        unlike = [role for role, name in whole.items() if not _plays(columns[name], roles[role].kinds)]
        if not missing and not unlike:
            fitting.append(DetectedFormat(form.name, whole))
    if len(fitting) == 1:
        return fitting[0]
    given = ", ".join(f"{role}: {name}" for role, name in named.items())
    raise FormatError(
        f"{place}data.columns {{{given}}} {'fits no format' if not fitting else 'fits several formats'}: "
        f"{_all_roles()}. Set data.format, or name other columns. {_listing(columns)}"
    )


def _checked(form: RowFormat, named: Mapping[str, str], columns: Columns, place: str) -> DetectedFormat:
    roles = {role.name: role for role in form.roles}
    unknown = [role for role in named if role not in roles]
    if unknown:
        raise FormatError(
            f"{place}data.columns has the role {unknown[0]!r}, but format {form.name!r} has {', '.join(roles)}."
        )
    whole = complete(form, named, columns)
    missing = [role.name for role in form.roles if role.is_required and role.name not in whole]
    if missing:
        wanted = ", ".join(f"{role}: …" for role in missing)
        raise FormatError(
            f"{place}format {form.name!r} needs a column for {', '.join(missing)}. Set data.columns: {{{wanted}}}. "
            f"{_listing(columns)}"
        )
    for role, name in whole.items():
        if not _plays(columns[name], roles[role].kinds):
            raise FormatError(
                f"{place}column {name!r} holds {columns[name].kind}, but {role!r} of format {form.name!r} must be "
                f"{' or '.join(roles[role].kinds)}. {_listing(columns)}"
            )
    return DetectedFormat(form.name, whole)


def _plays(column: Column, kinds: Iterable[str]) -> bool:
    return column.kind == EMPTY or column.kind in kinds


def _check_exist(named: Mapping[str, str], columns: Columns, place: str) -> None:
    for role, name in named.items():
        if name not in columns:
            raise FormatError(
                f"{place}there is no column {name!r} (data.columns, {role}). {_listing(columns)}"
            )


def _listing(columns: Columns) -> str:
    return f"Columns: {', '.join(map(str, columns.values()))}."


def _all_roles() -> str:
    return "; ".join(
        f"{name} has {', '.join(role.name for role in form.roles)}" for name, form in known_formats().items()
    )


def _advice(columns: Columns, found: list[DetectedFormat]) -> str:
    """The settings that would be right, as far as the columns tell."""
    chosen = [(one.name, dict(one.columns)) for one in found]
    if not chosen:
        chosen = _guesses(columns)
    if not chosen:
        return "None of them holds text: name another dataset."
    settings = [
        f"data.format: {name} with data.columns: {{{', '.join(f'{role}: {column}' for role, column in mapping.items())}}}"
        for name, mapping in chosen[:3]
    ]
    return f"Set {', or '.join(settings)}."


def _guesses(columns: Columns) -> list[tuple[str, dict[str, str]]]:
    for kind, name in ((MESSAGES, "messages"), (TURNS, "sharegpt")):
        if several := [column.name for column in columns.values() if column.kind == kind]:
            return [(name, {"messages": column}) for column in several]
    texts = [column for column in columns.values() if column.kind == TEXT]
    guesses: list[tuple[str, dict[str, str]]] = []
    answer = next((name for name in _ANSWERS if any(column.name == name for column in texts)), None)
    question = next((name for name in _QUESTIONS if any(column.name == name for column in texts)), None)
    if answer and question == "instruction":
        more = {"input": "context"} if "context" in columns else {}
        guesses.append(("alpaca", {"instruction": question, **more, "output": answer}))
    elif answer and question and answer != question:
        guesses.append(("prompt_completion", {"prompt": question, "completion": answer}))
    if texts:
        longest = max(texts, key=lambda column: len(str(column.example)))
        guesses.append(("text", {"text": longest.name}))
    return guesses
