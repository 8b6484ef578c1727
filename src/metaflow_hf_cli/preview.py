"""``metaflow hf preview``: the tokens that a run would train."""

import sys
from typing import Any

from metaflow._vendor import click

from .batch_text import print_batch
from .configured import config_argument, flow_parameters, looked_at
from .output import explained, json_option, print_json


@click.command(
    short_help="The exact tokens that a configuration trains.",
    help="Show a batch as training by CONFIG sees it, token for token, and which tokens carry loss: those are green; "
    "without color, those without are in ⟦ ⟧. Needs no GPU and stores nothing.",
)
@config_argument
@flow_parameters
@click.option(
    "--position",
    default=0,
    show_default=True,
    type=click.IntRange(min=0),
    help="Which claim of the run's order.",
)
@click.option(
    "--batch",
    "number",
    default=0,
    show_default=True,
    type=click.IntRange(min=0),
    help="Which of its batches.",
)
@click.option("--color/--no-color", default=None, help="Default: on a terminal.")
@json_option
@explained
def command(
    config: str, position: int, number: int, color: bool | None, as_json: bool, **parameters: Any
) -> None:
    """One batch."""
    with looked_at(config, parameters) as (run, _):
        shown = run.preview(position, number)
        is_order = all(one.is_built or one.is_exact for one in run.training)
    if as_json:
        print_json(shown.to_json())
        return
    if not is_order:
        click.echo("the dataset is not built yet: these are rows from its beginning", err=True)
    print_batch(shown, colored=sys.stdout.isatty() if color is None else color)
