"""``metaflow hf …``: the group, and where each of its commands lives.

Metaflow imports this module whenever ``metaflow`` is called for anything, so it costs next to nothing: a
command's module is imported when that command is called, and the help texts stand here.
"""

import importlib
from typing import Any

from metaflow._vendor import click

# name -> (module in this package, what `metaflow hf --help` says); the module's `command` is the click command.
COMMANDS = {
    "datasets": ("datasets", "Datasets of the hub: search by modality, download."),
    "demo-hub": ("demo_hub", "Serve the embedded hub, to try things without network."),
    "du": ("du", "How many bytes are stored, and for what."),
    "gc": ("gc", "Free what nothing refers to any more."),
    "models": ("models", "Models in the datastore: ls, show, get, rm, push."),
    "snapshots": ("snapshots", "Repositories of the hub in the datastore: get, ls, show, verify, rm."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called, not when they are listed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        return importlib.import_module(f"{__package__}.{COMMANDS[cmd_name][0]}").command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][1]) for name in self.list_commands(ctx)])


@click.group()
def cli() -> None:
    """What Metaflow takes the group from."""


@cli.group(cls=LazyGroup, help="Hugging Face models and datasets in Metaflow's datastore.")
def hf() -> None:
    """The group ``metaflow hf``."""
    from metaflow_extensions.hf.failures import tell_retries

    tell_retries()
