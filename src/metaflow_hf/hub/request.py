"""What a user asks for, with huggingface_hub's argument names, checked once and then passed on whole."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Self

from metaflow_hf import environment
from metaflow_hf.errors import SelectionError
from metaflow_hf.hub.endpoint import Endpoint
from metaflow_hf.hub.names import Repo, Selection, check_revision

logger = logging.getLogger("metaflow_hf.hub")

# Arguments of huggingface_hub that say where its own cache is or how it looks: there is another cache here.
WITHOUT_MEANING: Final = frozenset(
    {
        "cache_dir",
        "library_name",
        "library_version",
        "local_dir_use_symlinks",
        "proxies",
        "resume_download",
        "tqdm_class",
        "user_agent",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotRequest:
    """One repository, at one revision, some or all of its files, and how to get them."""

    repo: Repo
    revision: str
    selection: Selection
    endpoint: Endpoint
    filename: str | None = None
    local_dir: str | None = None
    force_download: bool = False
    offline: bool = False
    dry_run: bool = False
    max_workers: int = 8
    etag_timeout: float = 10.0
    token: bool | str | None = field(default=None, repr=False)
    headers: dict[str, str] | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls,
        repo_id: object,
        *,
        repo_type: str | None = None,
        revision: str | None = None,
        allow_patterns: list[str] | str | None = None,
        ignore_patterns: list[str] | str | None = None,
        filename: str | None = None,
        local_dir: object = None,
        force_download: bool = False,
        local_files_only: bool = False,
        dry_run: bool = False,
        max_workers: int = 8,
        etag_timeout: float = 10.0,
        token: bool | str | None = None,
        headers: Mapping[str, str] | None = None,
        endpoint: str | None = None,
        **others: object,
    ) -> Self:
        """``filename`` selects exactly this file. Raises ``SelectionError`` for a malformed id, revision or pattern, ``TypeError`` for a name that
        huggingface_hub does not know either.
        """
        unknown = sorted(set(others) - WITHOUT_MEANING)
        if unknown:
            raise TypeError(f"snapshot_download() got an unexpected keyword argument {unknown[0]!r}")
        if others:
            logger.debug("without meaning here and ignored: %s", ", ".join(sorted(others)))
        if max_workers < 1:
            raise SelectionError(f"max_workers must be at least 1, got {max_workers!r}.")
        return cls(
            repo=Repo.of(repo_id, repo_type),
            revision=check_revision(revision),
            selection=Selection.of(allow_patterns, ignore_patterns)
            if filename is None
            else Selection.file(filename),
            endpoint=Endpoint.of(endpoint),
            filename=filename,
            local_dir=None if local_dir is None else str(local_dir),
            force_download=bool(force_download),
            offline=environment.is_offline() or local_files_only,
            dry_run=bool(dry_run),
            max_workers=max_workers,
            etag_timeout=float(etag_timeout),
            token=token,
            headers=None if headers is None else dict(headers),
        )
