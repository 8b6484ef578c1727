"""``metaflow hf datasets``: what the hub has, by modality, and what training can do with it."""

import sys
from typing import Any

from metaflow._vendor import click

from .output import explained, json_option, print_json, print_table, say_on_stderr


@click.group(help="Datasets of the hub.")
def command() -> None:
    """The group ``metaflow hf datasets``."""


@command.command(help="Find datasets by words of their names and by modality; only text can be trained on.")
@click.argument("words", required=False)
@click.option("--query", help="Words of the name; the same as WORDS.")
@click.option(
    "--modality", help="text, document, image, audio, video, tabular, timeseries, geospatial or 3d."
)
@click.option("--author", help="Only those of this user or organisation.")
@click.option("--language", help="A code such as en.")
@click.option("--size", help="Rows: 1K, 1K-10K, 10K-100K, 100K-1M, 1M-10M, … 1T.")
@click.option("--sort", default="downloads", show_default=True, help="downloads, likes, last_modified, …")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(min=1), help="How many at most.")
@json_option
@explained
def search(as_json: bool, words: str | None, query: str | None, **wanted: Any) -> None:
    """One line per dataset, best first."""
    from metaflow_hf.hub import search_datasets

    found = search_datasets(" ".join(filter(None, (words, query))) or None, **wanted)
    if as_json:
        print_json([dataset.to_json() for dataset in found])
        return
    rows = [
        (
            dataset.repo_id,
            ", ".join(dataset.modalities),
            dataset.training,
            dataset.downloads,
            "gated" if dataset.gated else "private" if dataset.private else "",
        )
        for dataset in found
    ]
    print_table(("DATASET", "MODALITIES", "TRAINING", "DOWNLOADS", ""), rows, empty="no dataset was found")


@command.command(help="What training can do with each modality of the hub's datasets.")
@json_option
@explained
def modalities(as_json: bool) -> None:
    """One line per modality."""
    from metaflow_hf.hub.modalities import MODALITIES

    if as_json:
        print_json(MODALITIES)
    else:
        rows = [(name, f"modality:{name}", support) for name, support in MODALITIES.items()]
        print_table(("MODALITY", "FILTER TAG", "TRAINING"), rows, empty="")


@command.command(
    help="Download a dataset of any modality into the datastore, and to a directory; prints the path."
)
@click.argument("repo_id")
@click.option("--revision", help="Branch, tag, commit or refs/pr/N; main by default.")
@click.option(
    "--to", "local_dir", type=click.Path(file_okay=False), help="Directory for real, writable files."
)
@json_option
@explained
def download(repo_id: str, revision: str | None, local_dir: str | None, as_json: bool) -> None:
    """As a snapshot."""
    from metaflow_hf.hub.local import load_snapshot
    from metaflow_hf.hub.progress import progress_on
    from metaflow_hf.hub.request import SnapshotRequest

    request = SnapshotRequest.of(repo_id, repo_type="dataset", revision=revision, local_dir=local_dir)
    path = str(load_snapshot(request, progress_on(sys.stderr, say_on_stderr)))
    print_json({"path": path}) if as_json else click.echo(path)
