"""``metaflow hf gc``: frees what nothing refers to any more."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from metaflow._vendor import click

from .output import explained, json_option, print_json, print_table

if TYPE_CHECKING:
    from metaflow_hf.store.collection import Collected
    from metaflow_hf.train.collection import CollectedLineage


@click.command(short_help="Free what nothing refers to any more.")
@click.option("--dry-run", is_flag=True, help="Say what a pass would do now; change nothing.")
@click.option(
    "--keep-days", default=7.0, show_default=True, help="Days between noting and deleting; at least 7."
)
@json_option
@explained
def command(dry_run: bool, keep_days: float, as_json: bool) -> None:
    """Free the bytes that nothing refers to any more.

    What no snapshot, model or checkpoint names is noted by a first pass and deleted by one at least --keep-days
    later. Of trainings that were exported, or got no new record for 30 days, the tensors go at once; their history
    stays, and with rounds.keep: all everything does. Safe while flows run: call it daily.
    """
    from metaflow_hf.store import configured_store
    from metaflow_hf.store.collection import collect
    from metaflow_hf.train.collection import collect_lineages

    store = configured_store()
    blobs = collect(store, keep_days=keep_days, dry_run=dry_run)
    lineages = collect_lineages(store, dry_run=dry_run)
    if as_json:
        training = [lineage.to_json() for lineage in lineages]
        print_json({"store": store.uri, "dry_run": dry_run, **blobs.to_json(), "training": training})
        return
    click.echo(f"{store.uri}{': a rehearsal, nothing is changed' if dry_run else ''}")
    print_table(("WHAT", ">OBJECTS", ">SIZE"), list(_rows(blobs, lineages, keep_days)), empty="")


def _rows(
    blobs: "Collected", lineages: "Iterable[CollectedLineage]", keep_days: float
) -> Iterable[tuple[str, int, str]]:
    from metaflow_hf.hub.progress import format_bytes

    for words, found in (
        ("deleted", blobs.deleted),
        (f"noted, to be deleted in {keep_days:g} days", blobs.condemned),
        ("noted earlier, waiting", blobs.waiting),
        ("noted earlier, in use again", blobs.spared),
        ("left by killed writers, deleted", blobs.unfinished),
    ):
        yield words, len(found), format_bytes(sum(found.values()))
    for lineage in lineages:
        yield f"{lineage.reason} training {lineage.lineage}", lineage.objects, format_bytes(lineage.bytes)
