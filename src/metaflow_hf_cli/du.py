"""``metaflow hf du``: how much the datastore and this machine hold."""

from metaflow._vendor import click

from .output import explained, json_option, print_json, print_table


@click.command(help="How many bytes are stored, by what they are for, and how many this machine caches.")
@json_option
@explained
def command(as_json: bool) -> None:
    """One line per kind."""
    from metaflow_hf.hub.progress import format_bytes
    from metaflow_hf.store import configured_store
    from metaflow_hf.store.inspection import node_usage, usage
    from metaflow_hf.store.node_cache import NodeCache

    store = configured_store()
    found, node = usage(store), node_usage(NodeCache.default())
    if as_json:
        print_json(
            {"store": store.uri, "usage": [item.to_json() for item in found], "node_cache": node.to_json()}
        )
        return
    click.echo(store.uri)
    rows = [(item.name, item.objects, format_bytes(item.size)) for item in found]
    print_table(("WHAT", ">OBJECTS", ">SIZE"), rows, empty="")
    click.echo(f"this machine's cache {node.name}: {format_bytes(node.size)} in {node.objects} files")
