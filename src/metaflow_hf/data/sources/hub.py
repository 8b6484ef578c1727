"""Datasets of the hub, streamed at one commit.

``datasets`` decides which files make a configuration and split; they are read by ranged requests with the same
readers as local files, so that a cursor is a file and a row (a byte, in JSON lines), and nothing is downloaded
twice after an interruption.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Final

from metaflow_hf.data.sources.documents import only_documents
from metaflow_hf.data.sources.files import FileSource
from metaflow_hf.data.sources.readers import file_format, holds_rows
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
    documents = [] if any(map(holds_rows, remote)) else only_documents(remote)
    check_modalities(client, repo, commit, has_documents=bool(documents))
    if documents:
        config, split, paths = "documents", "train", documents
    else:
        builder = _builder(client, repo, location, commit)
        split, paths = _files_of_split(builder, location, commit)
        config = str(builder.config.name)
    return FileSource(
        name=repo.repo_id.rpartition("/")[2],
        source=f"hf://{repo.repo_id}:{config}:{split}",
        files=[HubFile(client, repo, commit, remote[path]) for path in paths],
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


def _files_of_split(builder: Any, location: HubLocation, commit: str) -> tuple[str, list[str]]:
    files: Mapping[str, list[str]] = builder.config.data_files or {}
    splits = list(map(str, files))
    split = location.split or ("train" if "train" in splits or len(splits) != 1 else splits[0])
    if split not in splits:
        raise SelectionError(
            f"hf://{location.repo_id}: there is no split {split!r} in configuration {builder.config.name!r}, only "
            f"{', '.join(splits) or 'none'}. Name one: hf://{location.repo_id}:{builder.config.name}:SPLIT."
        )
    marker = f"@{commit}/"
    paths = [str(url).partition(marker)[2] for url in files[split]]
    unreadable = [path for path in paths if file_format(path) is None]
    if unreadable or not paths:
        raise SelectionError(
            f"hf://{location.repo_id}: split {split!r} has no files with rows of text "
            f"({', '.join(unreadable[:3]) or 'no files at all'})."
        )
    return split, paths
