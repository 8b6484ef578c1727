"""What ``metaflow hf`` is in a task whose image has only what travels with the code: one line that says so."""

from metaflow._vendor import click

from metaflow_hf import __version__


@click.group()
def cli() -> None:
    """What Metaflow takes the command from."""


@cli.command(
    help="The commands of metaflow-hf, which is not installed here.",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True},
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def hf(arguments: tuple[str, ...]) -> None:
    """Refuses every command, whatever its arguments."""
    words = " ".join(("metaflow hf", *arguments[:1]))
    raise click.ClickException(
        f"`{words}`: the commands of metaflow-hf do not travel with the code of a task. Call them where metaflow-hf is "
        f"installed, or install it in the image of the task: pip install metaflow-hf=={__version__}"
    )
