"""How commands answer: tables for people, JSON for programs, and one line for what went wrong."""

import functools
import json
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
    """Columns as wide as they need to be; numbers are expected as text already. ``empty`` is said instead of no rows."""
    if not rows:
        click.echo(empty)
        return
    table = [list(headings), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(headings))]
    for row in table:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def say_on_stderr(line: str) -> None:
    """Progress: stdout is for the answer."""
    click.echo(line, err=True)
