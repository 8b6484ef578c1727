"""What the rest of the package may ask of an object store, and what it may rely on.

A store maps keys to immutable-by-convention byte strings. ``create`` is the only primitive that
correctness rests on; everything else is reading, or writing bytes that nobody else writes differently.
A directory is only another root of the same store.

Keys are relative, ``/``-separated, without empty, ``.`` or ``..`` parts. Use ``quote_part`` for a part that
comes from a user.
"""

import json
import os
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from metaflow_hf.errors import SelectionError


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object as a listing shows it; ``last_modified`` is the store's own clock, in UTC."""

    key: str
    size: int
    last_modified: datetime


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A file of a writer on a local disk that becomes an object when it is whole; ``last_modified`` in UTC."""

    path: Path
    size: int
    last_modified: datetime


@dataclass(frozen=True, slots=True)
class CreateResult:
    """Outcome of ``create``: ``created`` tells whether the key now holds our bytes, ``content`` what it holds."""

    created: bool
    content: bytes

    def json(self) -> Any:
        """The winner's content, decoded."""
        return json.loads(self.content)


@dataclass(frozen=True, slots=True)
class Digest:
    """Size in bytes and hexadecimal sha256 of a byte string."""

    sha256: str
    size: int


class ObjectStore(Protocol):
    """One root of an object store. Safe for use by many threads and processes at once.

    Every method raises ``StoreUnavailable`` when the store gives no usable answer after bounded retries,
    refuses access or is full, and ``SelectionError`` for a malformed key.
    """

    @property
    def uri(self) -> str:
        """Where this root is: a ``file://``, ``s3://``, ``gs://``, ``az://`` or ``memory://`` URI."""
        ...

    def create(self, key: str, data: bytes) -> CreateResult:
        """Atomic put-if-absent: of all callers, on any machines, exactly one creates the object.

        No reader ever sees a part of it. When the key is taken, or the answer got lost, the key is read:
        equal bytes count as created by us (a retry may have met its own first try), so what several
        writers may race for carries a nonce. Durable when it returns.
        """
        ...

    def put(self, key: str, data: bytes) -> None:
        """Atomic overwrite: a reader sees the old bytes or the new ones, never a mixture."""
        ...

    def get(self, key: str) -> bytes:
        """All bytes of one object. Raises ``NotFound``."""
        ...

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        """The bytes ``[start, stop)`` by one request; shorter only where the object ends. Raises ``NotFound``."""
        ...

    def head(self, key: str) -> ObjectInfo:
        """Size and time of one object. Raises ``NotFound``."""
        ...

    def children(self, prefix: str = "") -> list[str]:
        """The names directly below ``prefix/``, objects and sub-prefixes alike, sorted."""
        ...

    def delete(self, key: str) -> None:
        """Removes one object; a missing one is not an error."""
        ...

    def upload(self, path: Path, key: str, *, expected: Digest | None = None) -> Digest:
        """Streams a file into ``key`` and returns its digest; the object appears whole or not at all.

        An existing object is replaced: use it for keys that name their content. With ``expected``, a file
        that differs raises ``IntegrityError`` and nothing appears. Durable when it returns. Raises ``NotFound`` when
        there is no such file.
        """
        ...

    def take(self, path: Path, key: str, digest: Digest) -> None:
        """Makes a file of ours the object ``key``; the file is gone afterwards. ``digest`` is that of the file.

        As ``upload``, but a directory's store renames a file of its own file system instead of copying it.
        """
        ...

    def share(self, path: Path, key: str, digest: Digest) -> None:
        """Makes a file of ours that nobody will ever change the object ``key``; ``digest`` is that of the file.

        As ``upload``, but a directory's store gives a file of its own file system a second name instead of copying it.
        """
        ...

    def download(
        self, key: str, path: Path, *, expected: Digest | None = None, shared: bool = False
    ) -> Digest:
        """Streams an object into a file, which appears whole (by a rename) or not at all.

        With ``shared`` the caller will never change the file: it may be a second name of a directory's own. Raises
        ``NotFound``, and ``IntegrityError`` when the bytes are not the expected ones.
        """
        ...

    def unfinished(self) -> Iterator[Unfinished]:
        """What writers under way, or killed, have written of objects that have not appeared.

        Stores in the cloud show nothing of them: the lifecycle rule of the bucket removes their parts.
        """
        ...

    def child(self, prefix: str) -> "ObjectStore":
        """The same store rooted at ``prefix/``."""
        ...

    def list(self, prefix: str = "", *, after: str | None = None) -> Iterator[ObjectInfo]:
        """All objects below ``prefix/`` in order of their keys, those up to and including ``after`` left out.

        Lists any number of keys, page by page. An unknown prefix is empty.
        """
        ...


def check_key(key: str) -> str:
    """Returns ``key`` if it is well formed, else raises ``SelectionError``."""
    parts = key.split("/")
    _, hash_sign, tail = parts[-1].rpartition("#")
    if (
        not key
        or len(key.encode()) > 1000
        or any(part in ("", ".", "..") for part in parts)
        or any(ord(c) < 32 or c in "\\\x7f" for c in key)
        or (hash_sign and tail.isdigit())
    ):
        raise SelectionError(
            f"{key!r} is not a usable object key: it must be relative, of at most 1000 bytes, without empty "
            "parts, '.', '..', backslashes, control characters or an ending like '#1'."
        )
    return key


def quote_part(text: str, *, empty: str = "_empty") -> str:
    """One key part for any string, readable where possible and never equal for different strings.

    Letters, digits and ``-_.~:@+=,`` stay; everything else is percent-encoded with ``!`` for ``%``, because
    stores disagree about percent signs in keys. ``empty`` stands for the empty string.
    """
    if not text:
        return empty
    quoted = urllib.parse.quote(text, safe="-_.~:@+=,").replace("%", "!")
    if not quoted.strip("."):
        return quoted.replace(".", "!2E")
    return "!" + quoted if quoted == empty else quoted


def encode_json(value: Any) -> bytes:
    """Canonical JSON bytes: sorted keys, no spaces, UTF-8; the same value gives the same bytes everywhere."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def new_nonce() -> str:
    """128 random bits in hexadecimal, for objects that several writers may race for."""
    return os.urandom(16).hex()
