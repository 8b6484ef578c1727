"""``metaflow hf init``: the flows and configurations of this package as files of one's own."""

from pathlib import Path
from typing import TYPE_CHECKING

from metaflow._vendor import click

from .output import explained, json_option, print_json

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable


@click.command(
    short_help="Write flows and configurations to a directory.",
    help="Write the flows and the configurations of this package into DIRECTORY (flows/ and configs/), to be run and "
    "changed. Files that are there and differ are left alone, and named, unless --force.",
)
@click.argument("directory", type=click.Path(file_okay=False))
@click.option("--force", is_flag=True, help="Replace files that differ.")
@json_option
@explained
def command(directory: str, force: bool, as_json: bool) -> None:
    """One line per file, and what to do next."""
    from metaflow_hf.errors import SelectionError
    from metaflow_hf_cli.templates import template_files

    target, files = Path(directory), template_files()
    different = [name for name, file in files.items() if _differs(target / name, file)]
    if different and not force:
        raise SelectionError(
            f"{directory} holds other files of these names: {', '.join(different)}. Nothing was written. Choose another "
            "directory, or --force to replace them."
        )
    for name, file in files.items():
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(file.read_bytes())
    if as_json:
        print_json({"directory": str(directory), "files": list(files)})
        return
    for name in files:
        click.echo(str(target / name))
    click.echo(f"\ntry it:  cd {directory} && python flows/train_flow.py run")


def _differs(target: Path, file: "Traversable") -> bool:
    return target.exists() and target.read_bytes() != file.read_bytes()
