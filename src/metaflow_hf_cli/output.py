"""How commands answer: tables for people, JSON for programs, and one line for what went wrong."""

import functools
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any

from metaflow._vendor import click

from metaflow_hf.errors import MetaflowHFError

json_option = click.option("--json", "as_json", is_flag=True, help="Answer in JSON, for programs.")


def explained(command: Callable[..., None]) -> Callable[..., None]:
    """An error of metaflow-hf ends the command with one line and exit status 1."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except MetaflowHFError as error:
            raise click.ClickException(f"{type(error).__name__}: {error}") from error

    return run


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(value, indent=2, default=str))


def print_table(headings: Sequence[str], rows: Sequence[Sequence[object]], *, empty: str) -> None:
    """Columns as wide as they need to be; ``empty`` is said instead of no rows.

    A heading that begins with ``>`` is of a column of numbers, which end in one line. On a terminal that is too narrow
    the last column, a key as a rule, gets lines of its own, so that it can still be copied whole.
    """
    if not rows:
        click.echo(empty)
        return
    is_number = [heading.startswith(">") for heading in headings]
    table = [[printable(cell) for cell in row] for row in ([h.removeprefix(">") for h in headings], *rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    is_narrow = sum(widths) + 2 * (len(widths) - 1) > _terminal_width()
    for row in table:
        cells = [
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(row, widths, is_number, strict=True)
        ]
        if is_narrow and len(cells) > 1:
            click.echo("  ".join(cells[:-1]).rstrip())
            click.echo(f"  {row[-1]}")
        else:
            click.echo("  ".join(cells).rstrip())


def say_on_stderr(line: str) -> None:
    """Progress: stdout is for the answer."""
    click.echo(line, err=True)


def _terminal_width() -> float:
    """Columns of the terminal; a pipe takes lines of any length."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else float("inf")


def printable(cell: object) -> str:
    """The text of a cell as one line that is safe to print."""
    # Labels and metadata are anybody's: what would move the cursor is not passed on.
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in str(cell))
