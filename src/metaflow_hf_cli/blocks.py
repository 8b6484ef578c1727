"""``metaflow hf blocks``: datasets of blocks, from a source to the tokens of a batch."""

import sys
from typing import TYPE_CHECKING, Any

from metaflow._vendor import click

from .batch_text import print_batch
from .output import explained, json_option, print_json, print_table, printable, say_on_stderr

if TYPE_CHECKING:
    from metaflow_hf.data.lengths import Lengths

tokenizer_option = click.option("--tokenizer", metavar="REPO", help="A model of the hub, or a directory.")
documents_option = click.option(
    "--documents",
    default="whole",
    show_default=True,
    type=click.Choice(["whole", "pages"]),
    help="One row for each document, or for each page of a PDF.",
)


def _columns(_context: click.Context, _option: click.Parameter, value: str | None) -> dict[str, str] | None:
    from metaflow_hf.data.formats import parse_columns
    from metaflow_hf.errors import ConfigError

    try:
        return parse_columns(value) if value else None
    except ConfigError as error:
        raise click.BadParameter(str(error)) from error


column_option = click.option(
    "--text-column", help="The column of the texts or conversations, unless it is certain."
)
format_option = click.option(
    "--format", default="auto", show_default=True, help="The format of the rows (docs/data.md)."
)
columns_option = click.option(
    "--columns", callback=_columns, help="Columns by role: prompt=question,completion=answer."
)


def _names(_context: click.Context, _option: click.Parameter, value: str | None) -> list[str] | None:
    return value.split(",") if value else None


@click.group(help="Datasets of blocks: build, ls, preview, verify, stats.")
def command() -> None:
    """The group ``metaflow hf blocks``."""


@command.command(
    help="Stream SOURCE (hf://…, a file or directory) into blocks; goes on where it was interrupted."
)
@click.argument("source")
@click.option(
    "--output", "output_dir", help="Directory or URI; default: the user's cache, under a key of its own."
)
@click.option(
    "--datastore", is_flag=True, help="Into Metaflow's datastore, where trainings find it by its key."
)
@click.option("--samples-per-block", default=100_000, show_default=True, type=click.IntRange(min=1))
@format_option
@columns_option
@column_option
@click.option(
    "--keep-columns", callback=_names, help="The other columns to store, by commas; all by default."
)
@click.option("--on-bad-row", default="raise", show_default=True, type=click.Choice(["raise", "skip"]))
@documents_option
@click.option(
    "--num-proc", default=1, show_default=True, type=click.IntRange(min=1), help="Processes at most."
)
@click.option("--ascii-only", is_flag=True, help="Keep rows of ASCII text only.")
@click.option("--compression", type=click.Choice(["zstd"]))
@click.option("--max-rows", type=click.IntRange(min=1), help="Only the first ones.")
@click.option("--max-bytes", type=click.IntRange(min=1), help="Only the first ones, of JSON lines.")
@json_option
@explained
def build(source: str, output_dir: str | None, datastore: bool, as_json: bool, **settings: Any) -> None:
    """Progress goes to stderr, the place of the dataset to stdout."""
    from metaflow_hf.data.metered import build_metered
    from metaflow_hf.data.progress import show_on

    built = build_metered(
        source, output_dir, into_datastore=datastore, show=show_on(sys.stderr, say_on_stderr), **settings
    )
    print_json(built.to_json()) if as_json else click.echo(built.place)


@command.command("ls", help="List datasets of blocks in the datastore and in this machine's cache.")
@json_option
@explained
def list_datasets(as_json: bool) -> None:
    """One line per dataset."""
    from metaflow_hf.data.stored import known_stores, stored_datasets
    from metaflow_hf.hub.progress import format_bytes

    found = [(name, dataset) for name, store in known_stores() for dataset in stored_datasets(store)]
    if as_json:
        print_json([{"place": name, **dataset.to_json()} for name, dataset in found])
        return
    rows = [
        (
            name,
            dataset.dataset_name,
            f"{dataset.total_samples:,}",
            dataset.total_blocks,
            format_bytes(dataset.size),
            "damaged" if dataset.problem else "complete" if dataset.is_complete else "growing",
            dataset.key,
        )
        for name, dataset in found
    ]
    headings = ("PLACE", "NAME", ">ROWS", ">BLOCKS", ">SIZE", "STATE", "KEY")
    print_table(headings, rows, empty="no datasets of blocks are stored")


@command.command(
    help="Read every byte of a dataset (a directory, URI or key); exit status 1 if one is not as written."
)
@click.argument("dataset")
@json_option
@explained
def verify(dataset: str, as_json: bool) -> None:
    """One line per problem."""
    from metaflow_hf.data import verify_blocks
    from metaflow_hf.data.stored import open_dataset

    problems = verify_blocks(open_dataset(dataset))
    if as_json:
        print_json([{"file": problem.file, "message": problem.message} for problem in problems])
    else:
        for problem in problems:
            click.echo(printable(problem))
        if not problems:
            click.echo("every byte is as written")
    if problems:
        raise click.exceptions.Exit(1)


@command.command(help="Rows, bytes and lengths of texts of a dataset; tokens with --tokenizer.")
@click.argument("dataset")
@tokenizer_option
@column_option
@click.option(
    "--max-rows",
    default=100_000,
    show_default=True,
    type=click.IntRange(min=1),
    help="Rows measured at most.",
)
@json_option
@explained
def stats(dataset: str, tokenizer: str | None, text_column: str | None, max_rows: int, as_json: bool) -> None:
    """What there is, and how long it is."""
    from metaflow_hf.data import BlockManager
    from metaflow_hf.data.lengths import measure_lengths
    from metaflow_hf.data.stored import StoredDataset, open_dataset
    from metaflow_hf.hub.progress import format_bytes

    with BlockManager(open_dataset(dataset), text_column=text_column, enable_prefetch=False) as blocks:
        about = StoredDataset.of(blocks.manifest, key=dataset, uri=blocks.uri)
        characters, tokens = measure_lengths(blocks, _tokenizer(tokenizer), max_rows=max_rows)
        skipped = blocks.manifest.skipped_rows
    if as_json:
        lengths = {"characters": characters.to_json(), "tokens": tokens.to_json() if tokens else None}
        print_json({**about.to_json(), "skipped_rows": skipped, **lengths})
        return
    click.echo(f"{printable(about.dataset_name)}: {about.total_samples:,} rows ({skipped:,} skipped)")
    click.echo(
        f"{format_bytes(about.size)} in {about.total_blocks:,} blocks; column {printable(about.text_column)}"
    )
    _show_lengths("characters", characters, about.total_samples)
    if tokens is not None:
        _show_lengths("tokens", tokens, about.total_samples)


@command.command(help="The exact tokens of a batch, as training sees them, and which of them carry loss.")
@click.argument("dataset")
@click.option("--tokenizer", required=True, metavar="REPO", help="A model of the hub, or a directory.")
@format_option
@columns_option
@column_option
@click.option(
    "--sequence-length", default=1024, show_default=True, type=click.IntRange(min=2), help="In tokens."
)
@click.option("--batch-size", default=8, show_default=True, type=click.IntRange(min=1), help="In sequences.")
@click.option(
    "--rows", default=16, show_default=True, type=click.IntRange(min=1), help="Rows that are packed."
)
@click.option("--block", "block_id", default=0, show_default=True, type=click.IntRange(min=0))
@click.option(
    "--start", default=0, show_default=True, type=click.IntRange(min=0), help="First row of the block."
)
@click.option(
    "--batch", "number", default=0, show_default=True, type=click.IntRange(min=0), help="Which of them."
)
@click.option("--packing/--no-packing", default=True, show_default=True, help="Several rows in one sequence.")
@documents_option
@click.option("--loss-on", default="assistant", show_default=True, type=click.Choice(["assistant", "all"]))
@click.option("--color/--no-color", default=None, help="Default: on a terminal.")
@json_option
@explained
def preview(dataset: str, tokenizer: str, color: bool | None, as_json: bool, **settings: Any) -> None:
    """Tokens with loss are green; without color, those without are in ⟦ ⟧."""
    from metaflow_hf.data.preview import preview_batch

    shown = preview_batch(dataset, _tokenizer(tokenizer), **settings)
    if as_json:
        print_json(shown.to_json())
        return
    print_batch(shown, colored=sys.stdout.isatty() if color is None else color)


def _show_lengths(unit: str, lengths: "Lengths", total_rows: int) -> None:
    sampled = "" if lengths.measured >= total_rows else f" of {lengths.measured:,} rows"
    click.echo(f"\n{lengths.total:,} {unit}{sampled}; percentiles of a row:")
    headings = [f">{name}" for name in ("min", *(f"{p}%" for p in list(lengths.percentiles)[1:-1]), "max")]
    print_table(headings, [[f"{value:,}" for value in lengths.percentiles.values()]], empty="")


def _tokenizer(name: str | None) -> Any:
    """The tokenizer of a model; only its files are downloaded."""
    if name is None:
        return None
    from pathlib import Path

    from metaflow_hf.hub import snapshot_download
    from metaflow_hf.train.models import load_tokenizer

    files = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
    path = name if Path(name).is_dir() else snapshot_download(name, allow_patterns=files)
    return load_tokenizer(Path(path))
