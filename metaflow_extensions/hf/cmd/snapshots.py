"""``metaflow hf snapshots``: repositories of the hub in the datastore."""

import sys
from typing import TYPE_CHECKING, Any

from metaflow._vendor import click

from .output import explained, json_option, print_json, print_table, say_on_stderr

if TYPE_CHECKING:
    from metaflow_hf.hub.cache_info import CachedRepo, CachedRevision

_repo_type = click.option(
    "--repo-type",
    type=click.Choice(["model", "dataset", "space"]),
    default="model",
    show_default=True,
    help="Kind of repository.",
)


@click.group(help="Repositories of the hub in the datastore.")
def command() -> None:
    """The group ``metaflow hf snapshots``."""


@command.command(help="Download a repository into the datastore, and to a directory; prints the path.")
@click.argument("repo_id")
@click.option("--revision", help="Branch, tag, commit or refs/pr/N; main by default.")
@_repo_type
@click.option("--allow", multiple=True, help="Only files that match this pattern; may be repeated.")
@click.option("--ignore", multiple=True, help="No files that match this pattern; may be repeated.")
@click.option(
    "--to", "local_dir", type=click.Path(file_okay=False), help="Directory for real, writable files."
)
@click.option("--force", is_flag=True, help="Download again what is stored already.")
@click.option("--dry-run", is_flag=True, help="Say what would be downloaded.")
@json_option
@explained
def get(
    repo_id: str,
    revision: str | None,
    repo_type: str,
    allow: tuple[str, ...],
    ignore: tuple[str, ...],
    local_dir: str | None,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Download; or list the files that would be."""
    from metaflow_hf.hub.local import load_snapshot, snapshot_download
    from metaflow_hf.hub.progress import format_bytes, progress_on
    from metaflow_hf.hub.request import SnapshotRequest

    arguments: dict[str, Any] = {
        "revision": revision,
        "repo_type": repo_type,
        "allow_patterns": list(allow) or None,
        "ignore_patterns": list(ignore) or None,
        "local_dir": local_dir,
        "force_download": force,
    }
    if not dry_run:
        progress = progress_on(sys.stderr, say_on_stderr)
        path = str(load_snapshot(SnapshotRequest.of(repo_id, **arguments), progress))
        print_json({"path": path}) if as_json else click.echo(path)
        return
    plan = snapshot_download(repo_id, dry_run=True, **arguments)
    if as_json:
        print_json(
            [
                {"path": item.filename, "size": item.file_size, "will_download": item.will_download}
                for item in plan
            ]
        )
        return
    rows = [
        (item.filename, format_bytes(item.file_size or 0), "download" if item.will_download else "stored")
        for item in plan
    ]
    print_table(("FILE", "SIZE", ""), rows, empty="no files")
    missing = sum(item.file_size or 0 for item in plan if item.will_download)
    click.echo(f"{format_bytes(missing)} to download")


@command.command("ls", help="List what is stored.")
@json_option
@explained
def list_repos(as_json: bool) -> None:
    """One line per repository."""
    from metaflow_hf.hub import scan_cache

    info = scan_cache()
    if as_json:
        print_json({"size_on_disk": info.size_on_disk, "repos": [_repo_json(repo) for repo in info.repos]})
        return
    rows = [
        (repo.repo_id, repo.repo_type, repo.size_on_disk_str, len(repo.revisions), repo.endpoint)
        for repo in info.repos
    ]
    print_table(("REPO", "TYPE", "SIZE", "REVISIONS", "HUB"), rows, empty="no snapshots are stored")
    if rows:
        click.echo(f"{info.size_on_disk_str} in all")


@command.command(help="The stored revisions of one repository.")
@click.argument("repo_id")
@_repo_type
@json_option
@explained
def show(repo_id: str, repo_type: str, as_json: bool) -> None:
    """One line per revision."""
    repos = _stored(repo_id, repo_type)
    if as_json:
        print_json([_repo_json(repo) for repo in repos])
        return
    rows = [
        (
            revision.commit_hash,
            revision.size_on_disk_str,
            revision.num_files,
            revision.selections,
            f"{revision.last_modified:%Y-%m-%d %H:%M}",
            repo.endpoint,
        )
        for repo in repos
        for revision in repo.revisions
    ]
    print_table(("COMMIT", "SIZE", "FILES", "SELECTIONS", "STORED (UTC)", "HUB"), rows, empty="")


@command.command(help="Read stored bytes again and compare their checksums; exit status 1 if any are wrong.")
@click.argument("repo_id", required=False)
@_repo_type
@json_option
@explained
def verify(repo_id: str | None, repo_type: str, as_json: bool) -> None:
    """All repositories, or one."""
    from metaflow_hf.hub import scan_cache
    from metaflow_hf.store.datastore import configured_store
    from metaflow_hf.store.inspection import verify as verify_files
    from metaflow_hf.store.node_cache import NodeCache

    repos = scan_cache().repos if repo_id is None else _stored(repo_id, repo_type)
    keys = [key for repo in repos for revision in repo.revisions for key in revision.keys]
    found = list(verify_files(configured_store(), keys, NodeCache.default()))
    checked, problems = len(found), [problem for _, items in found for problem in items]
    if as_json:
        print_json({"blobs": checked, "problems": [problem.to_json() for problem in problems]})
    else:
        for problem in problems:
            click.echo(f"{problem.manifest}: {problem.path}: {problem.problem}")
        click.echo(f"{checked} blobs read, {len(problems)} files damaged")
    if problems:
        raise click.exceptions.Exit(1)


@command.command("rm", help="Forget revisions of a repository; `metaflow hf gc` frees their bytes later.")
@click.argument("repo_id")
@click.option("--revision", help="The beginning of a commit hash; all commits by default.")
@_repo_type
@json_option
@explained
def remove(repo_id: str, revision: str | None, repo_type: str, as_json: bool) -> None:
    """Delete manifests and their entries."""
    from metaflow_hf.hub import scan_cache

    found = [
        item.commit_hash
        for repo in _stored(repo_id, repo_type)
        for item in repo.revisions
        if item.commit_hash.startswith(revision or "")
    ]
    if not found:
        raise click.ClickException(f"no commit of {repo_id} that begins with {revision!r} is stored.")
    deletion = scan_cache().delete_revisions(*found)
    deletion.execute()
    if as_json:
        print_json({"commits": found, "expected_freed_size": deletion.expected_freed_size})
    else:
        click.echo(
            f"forgot {len(found)} revisions; up to {deletion.expected_freed_size_str} go by `metaflow hf gc`"
        )


def _stored(repo_id: str, repo_type: str) -> "list[CachedRepo]":
    from metaflow_hf.hub import scan_cache

    found = [repo for repo in scan_cache().repos if (repo.repo_id, repo.repo_type) == (repo_id, repo_type)]
    if not found:
        raise click.ClickException(
            f"no snapshot of {repo_type} {repo_id!r} is stored: see `metaflow hf snapshots ls`."
        )
    return found


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
