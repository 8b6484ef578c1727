"""The files of one commit on the hub, read in parts without being downloaded: headers of weights, for a plan."""

from collections.abc import Mapping
from functools import cached_property

from metaflow_hf.errors import SelectionError
from metaflow_hf.hub.client import HubClient, RemoteFile
from metaflow_hf.hub.ranged import RangedFile
from metaflow_hf.hub.request import SnapshotRequest


class RepositoryFiles:
    """Sizes and parts of files; ``sizes`` are known to the caller, the hub is asked when a file is read.

    Raises the hub's errors, ``HubUnavailable`` offline.
    """

    def __init__(self, request: SnapshotRequest, commit_hash: str, sizes: Mapping[str, int]) -> None:
        self.sizes = sizes
        self._request = request
        self._commit_hash = commit_hash

    def read(self, path: str, start: int, stop: int) -> bytes:
        """Bytes ``[start, stop)`` of a file, by ranged requests."""
        file = RangedFile(self._client, self._request.repo, self._commit_hash, self._file(path))
        file.seek(start)
        parts = bytearray()
        while len(parts) < stop - start and (part := file.read(stop - start - len(parts))):
            parts += part
        return bytes(parts)

    def _file(self, path: str) -> RemoteFile:
        try:
            return self._files[path]
        except KeyError as error:
            raise SelectionError(f"{self._request.repo} has no file {path!r}.") from error

    @cached_property
    def _files(self) -> dict[str, RemoteFile]:
        return {file.path: file for file in self._client.tree(self._request.repo, self._commit_hash)}

    @cached_property
    def _client(self) -> HubClient:
        request = self._request
        return HubClient(
            request.endpoint,
            token=request.token,
            headers=request.headers,
            timeout_seconds=request.etag_timeout,
        )
