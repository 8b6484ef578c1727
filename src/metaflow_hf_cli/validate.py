"""``metaflow hf validate``: what is wrong with a configuration, or what it resolves to."""

import json
from typing import Any

from metaflow._vendor import click

from .configured import config_argument, flow_parameters, read_job
from .output import explained, json_option, print_json, print_table


@click.command(
    short_help="All mistakes of a configuration at once.",
    help="Check the training configuration CONFIG: all mistakes at once, with path, value, what is allowed and the nearest "
    "spelling; exit status 1 if there are any. Else every value, and where it comes from. Asks no hub: whether the model can "
    "be trained like that tells `metaflow hf plan`.",
)
@config_argument
@flow_parameters
@click.option("--quiet", is_flag=True, help="Say nothing about a configuration without mistakes.")
@json_option
@explained
def command(config: str, quiet: bool, as_json: bool, **parameters: Any) -> None:
    """The resolved configuration, or all mistakes."""
    _, settings = read_job(config, parameters)
    if as_json:
        print_json([{"path": one.path, "value": one.value, "source": one.source} for one in settings])
    elif not quiet:
        rows = [(one.path, spell(one.value), one.source or "default") for one in settings]
        print_table(("SETTING", "VALUE", "FROM"), rows, empty="")


def spell(value: Any) -> str:
    """A value as YAML has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return json.dumps(value, ensure_ascii=False)
    return f"{value:g}" if isinstance(value, float) else str(value)
