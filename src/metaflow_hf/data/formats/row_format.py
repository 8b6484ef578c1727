"""What a row format is: which columns play which roles, and what a row of it says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from metaflow_hf.data.formats.columns import Columns
from metaflow_hf.data.formats.examples import Example


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """One role of a format.

    ``names`` are the columns that usually play it, ``kinds`` what such a column may hold (see ``columns``). A role
    with ``any_name`` is played by the only column of such a kind, whatever its name.
    """

    name: str
    names: Sequence[str]
    kinds: Sequence[str]
    is_required: bool = True
    any_name: bool = False


class RowFormat(Protocol):
    """How rows of one kind are read. The first role is the one that every row with content has.

    A format of your own is one object with these members, given to ``register_format``.
    """

    @property
    def name(self) -> str: ...

    @property
    def roles(self) -> Sequence[Role]: ...

    def example(self, row: Mapping[str, Any], columns: Mapping[str, str]) -> Example | None:
        """What the row says; ``columns`` is role -> column. ``None`` for a row without content.

        Raises ``RowProblem`` for a row that cannot be used.
        """
        ...


def match_roles(form: RowFormat, columns: Columns, *, by_name: bool = True) -> list[dict[str, str]]:
    """The ways in which a format's columns are all there: none, one, or several.

    ``by_name`` takes the usual names only, otherwise roles with ``any_name`` are played by columns of any name.
    """
    mappings: list[dict[str, str]] = [{}]
    for role in form.roles:
        playing = [name for name in role.names if name in columns and columns[name].kind in role.kinds]
        if not by_name and role.any_name:
            playing = [name for name, column in columns.items() if column.kind in role.kinds]
        if role.is_required:
            mappings = [{**mapping, role.name: name} for mapping in mappings for name in playing]
        elif playing:
            mappings = [{**mapping, role.name: playing[0]} for mapping in mappings]
    return mappings


def complete(form: RowFormat, named: Mapping[str, str], columns: Columns) -> dict[str, str]:
    """Role -> column: what the user named, and the usual columns for the roles that were not named."""
    mapping = dict(named)
    for role in form.roles:
        if role.name in mapping:
            continue
        usual = [name for name in role.names if name in columns and columns[name].kind in role.kinds]
        others = [name for name, column in columns.items() if role.any_name and column.kind in role.kinds]
        playing = usual or (others if len(others) == 1 else [])
        if playing:
            mapping[role.name] = playing[0]
    return mapping
