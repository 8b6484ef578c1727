"""Which format the rows of a dataset have, and which columns play its roles: certain, or refused with what to set."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final

from metaflow_hf.data.formats.advice import advice, answer_column, listing
from metaflow_hf.data.formats.columns import EMPTY, MESSAGES, TEXT, TURNS, Column, Columns, describe_columns
from metaflow_hf.data.formats.examples import Example
from metaflow_hf.data.formats.refused import refused_kind
from metaflow_hf.data.formats.registry import AUTO, find_format, known_formats
from metaflow_hf.data.formats.row_format import complete, match_roles
from metaflow_hf.errors import ConfigError, FormatError

DETECTED_ROWS: Final = 100


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
        return _checked(format, named, known, place)
    if named:
        return _by_roles(named, known, place)
    candidates = _matching(known, by_name=True)
    has_text = any(one.name != "text" or one.columns["text"] == "text" for one in candidates)
    if (refusal := refused_kind(known, has_text=has_text)) is not None:
        raise FormatError(f"{place}{refusal} {listing(known)}")
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
        f"{place}which columns are trained is not certain. {listing(columns)} "
        f"{advice(columns, [(one.name, one.columns) for one in found])}"
    )


def _matching(columns: Columns, *, by_name: bool) -> list[DetectedFormat]:
    return [
        DetectedFormat(name, mapping)
        for name, form in known_formats().items()
        for mapping in match_roles(form, columns, by_name=by_name)
    ]


def _is_text(columns: Columns, texts: list[DetectedFormat]) -> bool:
    """Whether one column is the text beyond doubt: named ``text``, or alone in being named as texts are; unanswered."""
    if answer_column(columns) is not None:
        return False
    return len(texts) == 1 or any(one.columns["text"] == "text" for one in texts)


def _is_rendering(columns: Columns, structured: DetectedFormat, texts: list[DetectedFormat]) -> bool:
    """Whether the only text beside texts of other roles is nothing but their rendering, as in the first Alpaca dataset."""
    required = [role.name for role in find_format(structured.name).roles if role.is_required]
    parts = [columns[structured.columns[role]] for role in required]
    if len(texts) != 1 or any(part.kind != TEXT for part in parts):
        return False
    whole = str(columns[texts[0].columns["text"]].example)
    return all(str(part.example) in whole for part in parts)


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
        f"{_all_roles()}. Set data.format, or name other columns. {listing(columns)}"
    )


def _checked(name: str, named: Mapping[str, str], columns: Columns, place: str) -> DetectedFormat:
    form = find_format(name)
    roles = {role.name: role for role in form.roles}
    unknown = [role for role in named if role not in roles]
    if unknown:
        raise FormatError(
            f"{place}data.columns has the role {unknown[0]!r}, but format {name!r} has {', '.join(roles)}."
        )
    whole = complete(form, named, columns)
    missing = [role.name for role in form.roles if role.is_required and role.name not in whole]
    if missing:
        wanted = ", ".join(f"{role}: …" for role in missing)
        raise FormatError(
            f"{place}format {name!r} needs a column for {', '.join(missing)}. Set data.columns: {{{wanted}}}. "
            f"{listing(columns)}"
        )
    for role, column in whole.items():
        if not _plays(columns[column], roles[role].kinds):
            raise FormatError(
                f"{place}column {column!r} holds {columns[column].kind}, but {role!r} of format {name!r} must be "
                f"{' or '.join(roles[role].kinds)}. {listing(columns)}"
            )
    # A name like module:attribute finds it in every process.
    return DetectedFormat(name, whole)


def _plays(column: Column, kinds: Iterable[str]) -> bool:
    return column.kind == EMPTY or column.kind in kinds


def _check_exist(named: Mapping[str, str], columns: Columns, place: str) -> None:
    for role, name in named.items():
        if name not in columns:
            raise FormatError(
                f"{place}there is no column {name!r} (data.columns, {role}). {listing(columns)}"
            )


def _all_roles() -> str:
    return "; ".join(
        f"{name} has {', '.join(role.name for role in form.roles)}" for name, form in known_formats().items()
    )
