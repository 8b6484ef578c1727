"""``metaflow hf snapshots``: repositories of the hub in the datastore."""

import sys
from typing import TYPE_CHECKING, Any

from metaflow._vendor import click

from .output import explained, json_option, print_json, print_table, say_on_stderr
from .stored import find_stored, is_key

if TYPE_CHECKING:
    from metaflow_hf.hub.cache_info import CachedRepo, CachedRevision
    from metaflow_hf.store.manifests import Manifest

_TYPES = click.Choice(["model", "dataset", "space"])
_any_type = click.option("--repo-type", type=_TYPES, help="Only repositories of this kind.")
_EXAMPLE = "\n\n    TARGET is org/name, org/name@revision (a commit may be cut short) or a key.\n    "


@click.group(short_help="Repositories of the hub in the datastore: get, ls, show, verify, rm.")
def command() -> None:
    """Repositories of the hub in the datastore."""


@command.command(short_help="Download a repository, or write out a stored one.")
@click.argument("target")
@click.option("--revision", help="Branch, tag, commit or refs/pr/N; main by default.")
@click.option("--repo-type", type=_TYPES, default="model", show_default=True, help="Kind of repository.")
@click.option("--allow", multiple=True, help="Only files like this pattern; may be repeated.")
@click.option("--ignore", multiple=True, help="No files like this pattern; may be repeated.")
@click.option(
    "--to", "local_dir", type=click.Path(file_okay=False), help="Directory for real, writable files."
)
@click.option("--force", is_flag=True, help="Download again what is stored already.")
@click.option("--dry-run", is_flag=True, help="Say what would be downloaded.")
@json_option
@explained
def get(
    target: str,
    revision: str | None,
    repo_type: str,
    allow: tuple[str, ...],
    ignore: tuple[str, ...],
    local_dir: str | None,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Download a repository into the datastore; print the path of its files.

    TARGET is org/name, org/name@revision, or the key of something stored (then --to says where it goes). Without --to
    the files are links into this machine's cache, to be read only.
    """
    from metaflow_hf.errors import SelectionError
    from metaflow_hf.hub.local import bring_snapshot, snapshot_download
    from metaflow_hf.hub.progress import progress_on
    from metaflow_hf.hub.request import SnapshotRequest

    if is_key(target):
        _get_by_key(target, local_dir, as_json)
        return
    repo_id, _, named = target.partition("@")
    if named and revision and named != revision:
        raise SelectionError(f"{target!r} names a revision, and --revision {revision!r} another: give one.")
    arguments: dict[str, Any] = {
        "revision": named or revision,
        "repo_type": repo_type,
        "allow_patterns": list(allow) or None,
        "ignore_patterns": list(ignore) or None,
        "local_dir": local_dir,
        "force_download": force,
    }
    if dry_run:
        _show_plan(snapshot_download(repo_id, dry_run=True, **arguments), as_json)
        return
    request = SnapshotRequest.of(repo_id, **arguments)
    with progress_on(sys.stderr, say_on_stderr) as progress:
        reference, path = bring_snapshot(request, progress)
    print_json({"path": str(path), "reference": reference.to_json()}) if as_json else click.echo(path)


def _get_by_key(key: str, local_dir: str | None, as_json: bool) -> None:
    from metaflow_hf.errors import SelectionError
    from metaflow_hf.hub.loading import load_reference

    if local_dir is None:
        raise SelectionError(f"{key!r} is a key: --to DIRECTORY says where its files go.")
    path = str(load_reference(key, local_dir))
    print_json({"path": path, "key": key}) if as_json else click.echo(path)


def _show_plan(plan: list[Any], as_json: bool) -> None:
    from metaflow_hf.hub.progress import format_bytes

    if as_json:
        print_json(
            [
                {"path": item.filename, "size": item.file_size, "will_download": item.will_download}
                for item in plan
            ]
        )
        return
    rows = [
        (format_bytes(item.file_size or 0), "download" if item.will_download else "stored", item.filename)
        for item in plan
    ]
    print_table((">SIZE", "", "FILE"), rows, empty="no files")
    missing = sum(item.file_size or 0 for item in plan if item.will_download)
    total = sum(item.file_size or 0 for item in plan)
    click.echo(f"{format_bytes(missing)} to download, {format_bytes(total - missing)} stored")


@command.command("ls", short_help="List what is stored.")
@json_option
@explained
def list_repos(as_json: bool) -> None:
    """List the stored repositories, largest first."""
    from metaflow_hf.hub import scan_cache

    info = scan_cache()
    if as_json:
        print_json({"size_on_disk": info.size_on_disk, "repos": [_repo_json(repo) for repo in info.repos]})
        return
    rows = [
        (repo.repo_type, repo.size_on_disk_str, len(repo.revisions), repo.endpoint, repo.repo_id)
        for repo in info.repos
    ]
    print_table(("TYPE", ">SIZE", ">REVISIONS", "HUB", "REPO"), rows, empty="no snapshots are stored")
    if rows:
        click.echo(f"{info.size_on_disk_str} in all")


@command.command(
    short_help="The stored commits of a repository, or the files of one.",
    help="Show the stored commits of a repository, or the files of one commit." + _EXAMPLE,
)
@click.argument("target")
@_any_type
@json_option
@explained
def show(target: str, repo_type: str | None, as_json: bool) -> None:
    """One line per commit, or per file."""
    from metaflow_hf.store import configured_store
    from metaflow_hf.store.manifests import read_manifest
    from metaflow_hf.store.models import find_manifest

    store = configured_store()
    if is_key(target):
        key, manifest = find_manifest(store, target)
        _show_files({key: manifest}, as_json)
        return
    found = find_stored(target, repo_type)
    if "@" in target:
        keys = [key for item in found for key in item.revision.keys]
        _show_files({key: read_manifest(store, key) for key in keys}, as_json)
        return
    repos = [item.repo for n, item in enumerate(found) if item.repo not in [x.repo for x in found[:n]]]
    if as_json:
        print_json([_repo_json(repo) for repo in repos])
        return
    for repo in repos:
        click.echo(f"{repo.repo_type} {repo.repo_id} from {repo.endpoint}, {repo.size_on_disk_str}")
        print_table(
            ("COMMIT", "STORED (UTC)", ">SIZE", ">FILES"), [_row(r) for r in repo.revisions], empty=""
        )


def _row(revision: "CachedRevision") -> tuple[object, ...]:
    stored = f"{revision.last_modified:%Y-%m-%d %H:%M}"
    return revision.commit_hash, stored, revision.size_on_disk_str, revision.num_files


def _show_files(manifests: "dict[str, Manifest]", as_json: bool) -> None:
    """The files of each manifest; several are the selections of one commit that are stored."""
    from metaflow_hf.hub.progress import format_bytes

    if as_json:
        print_json(
            [
                {
                    "key": key,
                    "about": dict(manifest.about),
                    "size": manifest.size,
                    "files": [file.to_json() for file in manifest.files],
                }
                for key, manifest in manifests.items()
            ]
        )
        return
    for key, manifest in manifests.items():
        click.echo(key)
        rows = [(format_bytes(file.size), file.sha256[:12], file.path) for file in manifest.files]
        print_table((">SIZE", "SHA256", "FILE"), rows, empty="no files")


@command.command(
    short_help="Read stored bytes again and compare checksums.",
    help="Read stored bytes again and compare their sha256. Exit status 1 if any are wrong or missing; `get` heals a "
    "snapshot. Without TARGET everything that is stored, models and checkpoints too." + _EXAMPLE,
)
@click.argument("target", required=False)
@_any_type
@json_option
@explained
def verify(target: str | None, repo_type: str | None, as_json: bool) -> None:
    """Everything, or one target."""
    from metaflow_hf.hub import scan_cache
    from metaflow_hf.store import configured_store
    from metaflow_hf.store.collection import NAMING
    from metaflow_hf.store.inspection import verify as verify_files
    from metaflow_hf.store.models import find_manifest
    from metaflow_hf.store.node_cache import NodeCache

    store = configured_store()
    if target is None and repo_type is not None:
        repos = [repo for repo in scan_cache().repos if repo.repo_type == repo_type]
        keys = [key for repo in repos for revision in repo.revisions for key in revision.keys]
    elif target is None:
        keys = [info.key for prefix in NAMING for info in store.list(prefix)]
    elif is_key(target):
        keys = [find_manifest(store, target)[0]]
    else:
        keys = [key for item in find_stored(target, repo_type) for key in item.revision.keys]
    found = list(verify_files(store, keys, NodeCache.default()))
    problems = [problem for _, items in found for problem in items]
    if as_json:
        print_json({"blobs": len(found), "problems": [problem.to_json() for problem in problems]})
    else:
        for problem in problems:
            click.echo(": ".join(filter(None, (problem.manifest, problem.path, problem.problem))))
        click.echo(f"{len(found)} blobs read, {len(problems)} files damaged")
    if problems:
        raise click.exceptions.Exit(1)


@command.command(
    "rm",
    short_help="Forget commits of a repository.",
    help="Forget a repository, one of its commits, or a key. `metaflow hf gc` frees the bytes later."
    + _EXAMPLE,
)
@click.argument("target")
@click.option("--revision", help="Only this commit (or its beginning), branch or tag.")
@_any_type
@json_option
@explained
def remove(target: str, revision: str | None, repo_type: str | None, as_json: bool) -> None:
    """Delete manifests and their entries."""
    from metaflow_hf.hub import scan_cache

    if is_key(target):
        _remove_by_key(target, as_json)
        return
    found = find_stored(target, repo_type, revision)
    deletion = scan_cache().delete_selections(*(key for item in found for key in item.revision.keys))
    deletion.execute()
    if as_json:
        commits = [item.revision.commit_hash for item in found]
        print_json({"commits": commits, "expected_freed_size": deletion.expected_freed_size})
        return
    count = f"{len(found)} commit{'' if len(found) == 1 else 's'}"
    click.echo(f"forgot {count}; up to {deletion.expected_freed_size_str} go by `metaflow hf gc`")


def _remove_by_key(key: str, as_json: bool) -> None:
    from metaflow_hf.hub.cache_info import Deletion
    from metaflow_hf.store import configured_store
    from metaflow_hf.store.models import delete_reference

    store = configured_store()
    if key.startswith("manifests/"):
        # Without reading it: this is also how a damaged manifest goes.
        store.head(key)
        Deletion((key,), 0, store).execute()
    else:
        delete_reference(store, key)
    print_json({"key": key}) if as_json else click.echo(f"forgot {key}")


def _repo_json(repo: "CachedRepo") -> dict[str, Any]:
    return {
        "repo_id": repo.repo_id,
        "repo_type": repo.repo_type,
        "endpoint": repo.endpoint,
        "size_on_disk": repo.size_on_disk,
        "revisions": [_revision_json(revision) for revision in repo.revisions],
    }


def _revision_json(revision: "CachedRevision") -> dict[str, Any]:
    return {
        "commit_hash": revision.commit_hash,
        "size_on_disk": revision.size_on_disk,
        "num_files": revision.num_files,
        "last_modified": revision.last_modified.isoformat(),
        "keys": list(revision.keys),
    }
