"""``metaflow hf …``: the group, and where each of its commands lives.

Metaflow imports this module whenever ``metaflow`` is called for anything, so it costs next to nothing: a
command's module is imported when that command is called, and the help texts stand here.
"""

import contextlib
import importlib
import io
import sys
from collections.abc import Iterator
from typing import Any, Final

from metaflow._vendor import click

# name -> (module in this package, what `metaflow hf --help` says); the module's `command` is the click command.
COMMANDS = {
    "blocks": ("blocks", "Datasets of blocks: build, ls, preview, verify, stats."),
    "datasets": ("datasets", "Datasets of the hub: search by modality, download."),
    "demo-hub": ("demo_hub", "Serve the embedded hub, to try things without network."),
    "doctor": ("doctor", "What works here, and how to fix what does not."),
    "du": ("du", "How many bytes are stored, and for what."),
    "init": ("init", "Write the flows and configurations of this package to a directory."),
    "plan": ("plan", "What a configuration would do: tokens, rounds, memory, disk, time. Stores nothing."),
    "preview": ("preview", "The exact tokens that a configuration trains. Stores nothing."),
    "validate": ("validate", "All mistakes of a configuration at once, and what it resolves to."),
    "gc": ("gc", "Free what nothing refers to any more."),
    "models": ("models", "Models in the datastore: ls, show, get, rm, push."),
    "snapshots": ("snapshots", "Repositories of the hub in the datastore: get, ls, show, verify, rm."),
    "training": ("training", "How trainings are doing: ls, status, log."),
}


_GREETING: Final = "metaflow_hf.greeting"


class Mistake(click.ClickException):
    """Arguments that a command does not understand: one line, and exit status 2."""

    exit_code = 2


class QuietCollection(click.Group):
    """The source of ``hf`` for Metaflow, which greets on stdout before it calls a command.

    ``metaflow hf … --json`` answers programs there, so the greeting is left out for ``hf``: from where Metaflow asks
    for the command until the command begins.
    """

    def get_command(self, ctx: click.Context, cmd_name: str) -> Any:
        if cmd_name == "hf" and sys.argv[1:2] == ["hf"] and _GREETING not in ctx.meta:
            ctx.meta[_GREETING] = contextlib.redirect_stdout(io.StringIO())
            ctx.meta[_GREETING].__enter__()
        return super().get_command(ctx, cmd_name)


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called, not when they are listed."""

    def make_context(
        self, info_name: str, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        if parent is not None and _GREETING in parent.meta:
            parent.meta.pop(_GREETING).__exit__(None, None, None)
        with _mistakes_in_one_line():
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        with _mistakes_in_one_line():
            return super().invoke(ctx)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        return importlib.import_module(f"{__package__}.{COMMANDS[cmd_name][0]}").command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][1]) for name in self.list_commands(ctx)])


@contextlib.contextmanager
def _mistakes_in_one_line() -> Iterator[None]:
    try:
        yield
    except click.UsageError as error:
        words = " ".join(error.format_message().split()).rstrip(".")
        where = "" if error.ctx is None else f" See `{error.ctx.command_path} --help`."
        raise Mistake(f"{words}.{where}") from error


@click.group(cls=QuietCollection)
def cli() -> None:
    """What Metaflow takes the group from."""


@cli.group(cls=LazyGroup, help="Hugging Face models and datasets in Metaflow's datastore.")
def hf() -> None:
    """The group ``metaflow hf``."""
