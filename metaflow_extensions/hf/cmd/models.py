"""``metaflow hf models``: what tasks saved and training runs exported."""

from metaflow._vendor import click

from .output import explained, json_option, print_json, print_table


@click.group(help="Models in the datastore, by their keys.")
def command() -> None:
    """The group ``metaflow hf models``."""


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
            model.label,
            format_bytes(model.size),
            model.num_files,
            model.key,
        )
        for model in found
    ]
    print_table(("SAVED (UTC)", "LABEL", "SIZE", "FILES", "KEY"), rows, empty="no models are stored")


@command.command(help="The files of a model, snapshot or checkpoint.")
@click.argument("key")
@json_option
@explained
def show(key: str, as_json: bool) -> None:
    """What it is, and its files."""
    from metaflow_hf.hub.progress import format_bytes
    from metaflow_hf.store import configured_store
    from metaflow_hf.store.models import find_manifest

    _, manifest = find_manifest(configured_store(), key)
    if as_json:
        files = [file.to_json() for file in manifest.files]
        print_json({"key": key, "about": dict(manifest.about), "size": manifest.size, "files": files})
        return
    for name, value in manifest.about.items():
        click.echo(f"{name}: {value}")
    rows = [(file.path, format_bytes(file.size), file.sha256[:12]) for file in manifest.files]
    print_table(("FILE", "SIZE", "SHA256"), rows, empty="no files")


@command.command(help="Write the files of a model, snapshot or checkpoint to a directory.")
@click.argument("key")
@click.argument("directory", type=click.Path(file_okay=False))
@json_option
@explained
def get(key: str, directory: str, as_json: bool) -> None:
    """Real, writable files, verified; what else lies there stays."""
    from metaflow_hf.hub.loading import load_reference

    path = str(load_reference(key, directory))
    print_json({"path": path}) if as_json else click.echo(path)


@command.command("rm", help="Forget a model or checkpoint; `metaflow hf gc` frees its bytes later.")
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
    help="Upload a model (its key, or a directory) to a repository of the hub; prints the commit's address."
)
@click.argument("source")
@click.argument("repo_id")
@click.option("--revision", help="Branch to commit to; main by default.")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--message", help="The commit's message.")
@json_option
@explained
def push(
    source: str, repo_id: str, revision: str | None, private: bool, message: str | None, as_json: bool
) -> None:
    """One commit."""
    from metaflow_hf.hub import push as push_files

    info = push_files(source, repo_id, revision=revision, private=private or None, commit_message=message)
    if as_json:
        print_json({"repo_id": repo_id, "commit_hash": info.oid, "url": info.commit_url})
    else:
        click.echo(info.commit_url)
