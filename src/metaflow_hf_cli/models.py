"""``metaflow hf models``: what tasks saved and training runs exported."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from metaflow._vendor import click

from metaflow_hf.errors import SelectionError

from .output import explained, json_option, print_json, print_table, printable

if TYPE_CHECKING:
    from metaflow_hf.train.publishing import Publication


@click.group(short_help="Models in the datastore: ls, show, get, rm, push.")
def command() -> None:
    """Models that tasks saved and trainings exported, by the keys that `ls` prints.

    Keys of snapshots and checkpoints, and of what a reference names, are taken too.
    """


@command.command("ls", help="List models, newest first.")
@click.option("--flow", help="Only those of this flow.")
@json_option
@explained
def list_models(flow: str | None, as_json: bool) -> None:
    """One line per model."""
    from metaflow_hf.hub.progress import format_bytes
    from metaflow_hf.store import configured_store, quote_part
    from metaflow_hf.store.inspection import stored_models

    found = stored_models(configured_store(), "models" if flow is None else f"models/{quote_part(flow)}")
    if as_json:
        print_json([model.to_json() for model in found])
        return
    rows = [
        (
            f"{model.last_modified:%Y-%m-%d %H:%M}",
            format_bytes(model.size),
            model.num_files,
            model.label,
            model.key,
        )
        for model in found
    ]
    print_table(("SAVED (UTC)", ">SIZE", ">FILES", "LABEL", "KEY"), rows, empty="no models are stored")


@command.command(
    short_help="The files of a model, or where it is from.",
    help="Show what a key holds: its metadata and its files. With --lineage: which repositories at which commits, which "
    "dataset, chunks and rounds made it, back to the first model; KEY may be a run (TrainFlow/17) or a flow then.",
)
@click.argument("key")
@click.option("--lineage", is_flag=True, help="Where the model is from.")
@json_option
@explained
def show(key: str, lineage: bool, as_json: bool) -> None:
    """What it is, and its files."""
    from metaflow_hf.hub.progress import format_bytes
    from metaflow_hf.store import configured_store
    from metaflow_hf.store.models import find_manifest

    if lineage:
        _show_lineage(key, as_json=as_json)
        return
    _, manifest = find_manifest(configured_store(), key)
    if as_json:
        files = [file.to_json() for file in manifest.files]
        print_json({"key": key, "about": dict(manifest.about), "size": manifest.size, "files": files})
        return
    for name, value in manifest.about.items():
        click.echo(printable(f"{name}: {value if isinstance(value, str) else json.dumps(value)}"))
    rows = [(format_bytes(file.size), file.sha256[:12], file.path) for file in manifest.files]
    print_table((">SIZE", "SHA256", "FILE"), rows, empty="no files")


def _show_lineage(name: str, *, as_json: bool) -> None:
    from metaflow_extensions.hf.trained import find_model
    from metaflow_hf.store import configured_store
    from metaflow_hf.train.provenance import provenance

    from .lineage_text import provenance_lines

    found = list(provenance(configured_store(), find_model(name)))
    if as_json:
        print_json([one.to_json() for one in found])
        return
    for number, one in enumerate(found):
        if number:
            click.echo("\ntrained from\n")
        for line in provenance_lines(one):
            click.echo(printable(line))


@command.command(
    short_help="Write a model's files to a directory.",
    help="Write what a key holds to a directory: real, writable files, verified; what else lies there stays.",
)
@click.argument("key")
@click.argument("directory", type=click.Path(file_okay=False))
@json_option
@explained
def get(key: str, directory: str, as_json: bool) -> None:
    """Real, writable files, verified; what else lies there stays."""
    from metaflow_hf.hub.loading import load_reference

    path = str(load_reference(key, directory))
    print_json({"path": path}) if as_json else click.echo(path)


@command.command(
    "rm",
    short_help="Forget a model.",
    help="Forget a model, checkpoint or entry of a snapshot. `metaflow hf gc` frees its bytes later.",
)
@click.argument("key")
@json_option
@explained
def remove(key: str, as_json: bool) -> None:
    """Delete its manifest."""
    from metaflow_hf.store import configured_store
    from metaflow_hf.store.models import delete_reference

    delete_reference(configured_store(), key)
    print_json({"key": key}) if as_json else click.echo(f"forgot {key}")


@command.command(
    short_help="Upload a model to the hub.",
    help="Upload a model to a repository of the hub, which is made if it is missing, with a model card: what it was "
    "trained on, from which commits, how good it is. SOURCE is a key of `ls`, a run (TrainFlow/17), a flow (its latest "
    "successful run), or a directory, which is uploaded as it is. Prints the commit's address. Needs HF_TOKEN.",
)
@click.argument("source")
@click.argument("repo_id")
@click.option("--revision", help="Branch to commit to; main by default.")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--message", help="The commit's message.")
@click.option("--dry-run", is_flag=True, help="Show the files and the model card; ask the hub nothing.")
@json_option
@explained
def push(
    source: str,
    repo_id: str,
    revision: str | None,
    private: bool,
    message: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """One commit."""
    from metaflow_hf.hub import push as push_files
    from metaflow_hf.hub.names import Repo

    Repo.of(repo_id, "model")
    if Path(source).is_dir():
        if dry_run:
            raise SelectionError(
                f"{source!r} is a directory: it is uploaded as it is, there is nothing to show."
            )
        info = push_files(source, repo_id, revision=revision, private=private or None, commit_message=message)
        found = {"repo_id": repo_id, "commit_hash": info.oid, "url": str(info.commit_url)}
        print_json(found) if as_json else click.echo(info.commit_url)
        return
    from metaflow_extensions.hf.trained import find_model
    from metaflow_hf.store import configured_store
    from metaflow_hf.train.publishing import publish

    done = publish(
        configured_store(),
        find_model(source),
        repo_id,
        revision=revision,
        private=private or None,
        commit_message=message,
        dry_run=dry_run,
    )
    if as_json:
        print_json(done.to_json())
    elif done.url:
        click.echo(done.url)
    else:
        _show_dry_run(done)


def _show_dry_run(done: "Publication") -> None:
    from metaflow_hf.hub.progress import format_bytes

    rows = [(format_bytes(size), path) for path, size in done.files]
    print_table((">SIZE", "FILE"), rows, empty="no files")
    click.echo(f"\nThe model card of {done.repo_id}:\n")
    click.echo("\n".join(printable(line) for line in done.card.splitlines()))
