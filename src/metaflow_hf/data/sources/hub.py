"""Datasets of the hub, streamed at one commit.

``datasets`` decides which files make a configuration and split; they are read by ranged requests with the same
readers as local files, so that a cursor is a file and a row (a byte, in JSON lines), and nothing is downloaded
twice after an interruption.
"""

import re
from dataclasses import dataclass
from typing import Any, BinaryIO, Final

from metaflow_hf.data.sources.files import FileSource
from metaflow_hf.data.sources.layout import documents_of, layout_of_builder
from metaflow_hf.errors import SelectionError
from metaflow_hf.hub.client import HubClient, RemoteFile
from metaflow_hf.hub.endpoint import Endpoint
from metaflow_hf.hub.modalities import check_modalities
from metaflow_hf.hub.names import Repo, check_revision
from metaflow_hf.hub.ranged import RangedFile

_LOCATION: Final = re.compile(
    r"hf://(?:datasets/)?(?P<repo>[^:@]+)(?::(?P<config>[^:@]*))?(?::(?P<split>[^:@]*))?(?:@(?P<revision>.+))?"
)


@dataclass(frozen=True, slots=True)
class HubLocation:
    """The parts of ``hf://[owner/]name[:config[:split]][@revision]``."""

    repo_id: str
    config: str | None
    split: str | None
    revision: str | None

    @classmethod
    def parse(cls, text: str) -> "HubLocation":
        """Raises ``SelectionError`` for anything of another form."""
        match = _LOCATION.fullmatch(text)
        if match is None:
            raise SelectionError(
                f"{text!r} is not a dataset of the hub: write hf://[owner/]name[:config[:split]][@revision]."
            )
        parts = match.groupdict()
        return cls(
            parts["repo"].strip("/"),
            parts["config"] or None,
            parts["split"] or None,
            parts["revision"] or None,
        )


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a dataset at a commit."""

    client: HubClient
    repo: Repo
    commit_hash: str
    remote: RemoteFile

    @property
    def name(self) -> str:
        return self.remote.path

    @property
    def size(self) -> int:
        return self.remote.size

    def open(self) -> BinaryIO:
        return RangedFile.open(self.client, self.repo, self.commit_hash, self.remote)


def open_hub_dataset(text: str) -> FileSource:
    """The dataset at a ``hf://`` location, at the commit that its revision names now.

    A repository of nothing but documents gives their texts. Raises ``SelectionError`` for an unknown configuration
    or split and for files that hold no text, ``UnsupportedModalityError``, and the hub's errors.
    """
    location = HubLocation.parse(text)
    client = HubClient(Endpoint.of())
    repo = Repo.of(location.repo_id, "dataset")
    commit = client.resolve(repo, check_revision(location.revision)).commit_hash
    if "/" not in repo.repo_id:
        # `datasets` builds paths that need both parts.
        repo = Repo.of(client.canonical_id(repo, commit), "dataset")
    remote = {file.path: file for file in client.tree(repo, commit)}
    layout = documents_of(remote)
    check_modalities(client, repo, commit, has_documents=layout is not None)
    if layout is None:
        builder, marker = _builder(client, repo, location, commit), f"@{commit}/"
        layout = layout_of_builder(
            builder,
            location.split,
            lambda url: url.partition(marker)[2],
            where=f"hf://{location.repo_id}",
        )
    return FileSource(
        name=repo.repo_id.rpartition("/")[2],
        source=f"hf://{repo.repo_id}:{layout.config}:{layout.split}",
        files=[HubFile(client, repo, commit, remote[path]) for path in layout.paths],
        commit_hash=commit,
    )


def _builder(client: HubClient, repo: Repo, location: HubLocation, commit: str) -> Any:
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    try:
        return client.repeat(
            f"the configuration of {repo}",
            lambda: datasets.load_dataset_builder(
                repo.repo_id, name=location.config, revision=commit, token=client.token
            ),
        )
    except (ValueError, FileNotFoundError, DatasetNotFoundError) as error:
        reason = str(error).partition("\n")[0]
        raise SelectionError(f"{repo} at {commit[:12]} cannot be read as a dataset: {reason}") from error
