"""``metaflow hf gc``: frees what nothing refers to any more."""

from metaflow._vendor import click

from .output import explained, json_option, print_json


@click.command(
    help="Free the bytes that no snapshot, model or checkpoint refers to any more. The first pass notes them; a pass at "
    "least --keep-days later deletes them. Safe while flows run: call it daily."
)
@click.option("--dry-run", is_flag=True, help="Say what a pass would do now.")
@click.option(
    "--keep-days", default=7.0, show_default=True, help="Days between noting and deleting; at least 7."
)
@json_option
@explained
def command(dry_run: bool, keep_days: float, as_json: bool) -> None:
    """One pass."""
    from metaflow_hf.hub.progress import format_bytes
    from metaflow_hf.store import configured_store
    from metaflow_hf.store.collection import collect

    done = collect(configured_store(), keep_days=keep_days, dry_run=dry_run)
    if as_json:
        print_json({"dry_run": dry_run, **done.to_json()})
        return
    would = "would be " if dry_run else ""
    for words, blobs in (
        (f"{would}deleted", done.deleted),
        (f"{would}noted, to be deleted in {keep_days:g} days or later", done.condemned),
        ("noted earlier, waiting", done.waiting),
        ("noted earlier, in use again", done.spared),
    ):
        click.echo(f"{len(blobs)} blobs, {format_bytes(sum(blobs.values()))}: {words}")
