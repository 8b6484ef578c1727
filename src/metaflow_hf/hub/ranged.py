"""A file of the hub that is read without being downloaded: by ranged requests, retried one by one."""

import hashlib
import io
from typing import Any, BinaryIO, Final, cast

from metaflow_hf.errors import IntegrityError
from metaflow_hf.hub.client import HubClient, RemoteFile
from metaflow_hf.hub.names import Repo

REQUEST_BYTES: Final = 8 * 1024 * 1024


class RangedFile(io.RawIOBase):
    """One file of a commit as a seekable stream; each read is one request of at most ``REQUEST_BYTES``.

    Raises the hub's errors, ``HubUnavailable`` after the client's bounded retries, and ``IntegrityError`` once a
    file that was read from its beginning to its end is not what the hub's tree says.
    """

    def __init__(self, client: HubClient, repo: Repo, commit_hash: str, file: RemoteFile) -> None:
        self._client = client
        self._url = client.file_url(repo, commit_hash, file.path)
        self._what = f"{file.path!r} of {repo} at {commit_hash[:12]}"
        self._size = file.size
        self._file = file
        self._position = 0
        # The checksum of what was read, while it was read from the beginning and in order.
        self._checksum = _begin_checksum(file)
        self._checked = 0

    @classmethod
    def open(cls, client: HubClient, repo: Repo, commit_hash: str, file: RemoteFile) -> BinaryIO:
        """The file as a buffered stream."""
        return cast("BinaryIO", io.BufferedReader(cls(client, repo, commit_hash, file), REQUEST_BYTES))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(base + offset, 0)
        return self._position

    def readinto(self, buffer: Any) -> int:
        length = min(len(buffer), self._size - self._position, REQUEST_BYTES)
        if length <= 0:
            return 0
        start, stop = self._position, self._position + length
        data = self._client.repeat(self._what, lambda: self._request(start, stop))
        self._check(data, start, stop)
        buffer[:length] = data
        self._position = stop
        return length

    def _request(self, start: int, stop: int) -> bytes:
        headers = {**self._client.request_headers(), "Range": f"bytes={start}-{stop - 1}"}
        answer = self._client.get(self._url, headers)
        data = answer.body
        if answer.status == 200:
            # A proxy that ignores ranges sends the whole file.
            data = data[start:stop]
        if len(data) != stop - start:
            raise IntegrityError(
                f"{self._what}: {len(data)} bytes came instead of {stop - start} at {start}. Try again later."
            )
        if stop - start == self._size:
            # Wrong bytes of a file that comes by one request are noticed here, and asked for again.
            whole = _begin_checksum(self._file)
            whole.update(data)
            self._compare(whole)
        return data

    def _check(self, data: bytes, start: int, stop: int) -> None:
        if start <= self._checked < stop:
            self._checksum.update(data[self._checked - start :])
            self._checked = stop
            if stop == self._size:
                self._compare(self._checksum)

    def _compare(self, checksum: Any) -> None:
        expected = self._file.sha256 or self._file.oid
        if checksum.hexdigest() != expected:
            raise IntegrityError(
                f"{self._what} arrived damaged: its checksum is {checksum.hexdigest()}, not {expected}. The hub, a "
                "mirror or a proxy sends wrong bytes: check HF_ENDPOINT, and throw away what was made of this file."
            )


def _begin_checksum(file: RemoteFile) -> Any:
    """The sha256 of a file on LFS; git's own sha1, which covers the size, of a smaller one."""
    if file.sha256:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
