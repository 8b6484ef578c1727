"""From the store, or from a directory, to a repository of the hub."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metaflow_hf.errors import SelectionError
from metaflow_hf.hub.endpoint import Endpoint
from metaflow_hf.hub.loading import load_reference
from metaflow_hf.hub.names import Repo
from metaflow_hf.references import Reference
from metaflow_hf.store.models import files_to_save
from metaflow_hf.store.node_cache import NodeCache

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

    from metaflow_hf.hub.client import HubClient


def push(
    source: Reference | Mapping[str, Any] | str | Path,
    repo_id: str,
    *,
    repo_type: str = "model",
    revision: str | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    endpoint: str | None = None,
    token: bool | str | None = None,
) -> "CommitInfo":
    """Uploads a directory, or the files of a reference or key, as one commit; makes the repository if it is missing.

    Files that the hub already holds are not sent again, and other files of the repository stay. ``private`` counts
    for a new repository only. The answer has the ``oid`` of the commit and its ``commit_url``. Raises
    ``SelectionError`` when there is nothing to upload, ``HubUnavailable`` when the hub refuses it (which token may
    write there?) or does not answer.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    from metaflow_hf.hub.client import HubClient

    repo = Repo.of(repo_id, repo_type)
    if repo_type == "space":
        raise SelectionError("push uploads models and datasets; a space is made on the hub.")
    client = HubClient(Endpoint.of(endpoint), token=token)
    api = HfApi(endpoint=client.endpoint.url, token=token, library_name="metaflow-hf")
    folder, is_own = _folder(source)
    try:
        files = {name: path for name, path in files_to_save(folder).items() if ".git" not in name.split("/")}
        if not files:
            raise SelectionError(f"there is nothing to push at {str(source)!r} but what git keeps there.")
        what = f"the upload to {repo} (which needs a token that may write there)"
        client.repeat(
            what, lambda: api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
        )
        with nullcontext() if client.repeat(what, lambda: _takes_xet(client, repo)) else _by_lfs():
            return client.repeat(
                what,
                # Not upload_folder, which makes several commits of many files.
                lambda: api.create_commit(
                    repo_id,
                    [CommitOperationAdd(name, path) for name, path in sorted(files.items())],
                    repo_type=repo_type,
                    revision=revision,
                    commit_message=commit_message or "Upload with metaflow-hf",
                    create_pr=create_pr,
                ),
            )
    finally:
        if is_own:
            NodeCache.default().remove_work_dir(folder)


def _takes_xet(client: "HubClient", repo: Repo) -> bool:
    """Whether the hub takes large files by Xet, which huggingface_hub takes for granted; hubs of one's own may not."""
    from huggingface_hub.errors import HfHubHTTPError

    url = f"{client.endpoint.url}/api/{repo.repo_type}s/{repo.repo_id}/xet-write-token/main"
    try:
        client.get(url, client.request_headers())
    except HfHubHTTPError as error:
        if error.response.status_code != HTTPStatus.NOT_FOUND:
            raise
        return False
    return True


@contextmanager
def _by_lfs() -> Iterator[None]:
    """Uploads of this process go by LFS; huggingface_hub has no other way to say so."""
    from huggingface_hub import constants

    before = constants.HF_HUB_DISABLE_XET
    constants.HF_HUB_DISABLE_XET = True
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = before


def _folder(source: Reference | Mapping[str, Any] | str | Path) -> tuple[Path, bool]:
    """A directory with the files, and whether it was made for this upload."""
    is_key = isinstance(source, str) and source.startswith(("snapshots/", "models/", "checkpoints/"))
    if isinstance(source, (str, Path)) and (Path(source).is_dir() or not is_key):
        if Path(source).is_file():
            raise SelectionError(f"{str(source)!r} is a file: push its directory.")
        return Path(source), False
    assert not isinstance(source, Path)
    return load_reference(source), True
