"""The files in a zip or tar archive, as if each lay beside it, and the samples of a webdataset archive."""

import io
import json
import lzma
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, Final, cast

from metaflow_hf.data.rows import InputRow, Unreadable
from metaflow_hf.data.sources.compression import (
    READ_BYTES,
    OpenableFile,
    damage_named,
    open_content,
    open_seekable,
    uncompressed_name,
)
from metaflow_hf.errors import SelectionError

ZIP: Final = ".zip"
TAR: Final = ".tar"
ARCHIVES: Final = (ZIP, TAR)
_ENCRYPTED: Final = 0x1
_DAMAGE: Final = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError)
# Samples are files of one name, up to its first dot; what follows names the column.
_SAMPLE: Final = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
_DECODERS: Final[dict[str, Callable[[bytes], Any]]] = {
    **dict.fromkeys(("txt", "text", "transcript"), bytes.decode),
    **dict.fromkeys(("cls", "cls2", "index", "inx", "id"), int),
    **dict.fromkeys(("json", "jsn"), json.loads),
}


@dataclass(frozen=True, slots=True)
class Member:
    """One file of an open archive: ``path`` within it, and ``name`` for people with that of the archive."""

    name: str
    path: str
    _open: Callable[[], BinaryIO]

    def open(self) -> BinaryIO:
        """The content as a seekable stream."""
        return self._open()


@contextmanager
def opened_archive(file: OpenableFile) -> Iterator[list[Member]]:
    """The members of a zip archive in the order of their names, without hidden ones.

    Raises ``IntegrityError`` naming the archive when it is damaged.
    """
    with (
        file.open() as stored,
        damage_named(file.name, *_DAMAGE),
        io.BufferedReader(cast("io.RawIOBase", stored), READ_BYTES) as stream,
        zipfile.ZipFile(stream) as archive,
    ):
        yield [
            _zip_member(file.name, archive, info)
            for info in sorted(archive.infolist(), key=lambda info: info.filename)
            if not info.is_dir() and not _is_hidden(info.filename)
        ]


def _zip_member(name: str, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Member:
    name = f"{name}/{info.filename}"

    def open_member() -> BinaryIO:
        """Its checksum is compared at the end."""
        if info.flag_bits & _ENCRYPTED:
            raise SelectionError(f"{name} is encrypted: unpack the archive first.")
        return cast("BinaryIO", archive.open(info))

    return Member(name, info.filename, open_member)


@contextmanager
def opened_tar(file: OpenableFile) -> Iterator[list[Member]]:
    """The files in a tar archive, also compressed, in its own order, without hidden ones; nothing is unpacked.

    Raises ``IntegrityError`` naming the archive when it is damaged.
    """
    with (
        open_seekable(file) as stored,
        damage_named(file.name, tarfile.TarError),
        tarfile.open(fileobj=stored, mode="r:") as archive,
    ):
        members = [info for info in archive if info.isfile() and not _is_hidden(info.name)]
        yield [_tar_member(file.name, archive, info) for info in members]


def _tar_member(name: str, archive: tarfile.TarFile, info: tarfile.TarInfo) -> Member:
    def open_member() -> BinaryIO:
        return cast("BinaryIO", archive.extractfile(info))

    return Member(f"{name}/{info.name}", info.name.removeprefix("./"), open_member)


def webdataset_rows(members: list[Member], archive: str) -> Iterator[InputRow]:
    """A row for each sample: consecutive members that have the same name up to the first dot.

    The endings are the columns; texts, numbers and JSON are decoded as `datasets` does, everything else stays bytes.
    ``__key__`` is the name of the sample and ``__url__`` that of the archive.
    """
    sample: dict[str, Any] = {}
    key = None
    for member in members:
        match = _SAMPLE.fullmatch(member.path)
        if match is None:
            continue
        if match[1] != key:
            if sample:
                yield _finished(sample, key, archive)
            sample, key = {}, match[1]
        if match[2] in sample:
            raise SelectionError(f"{archive}: sample {key!r} has the field {match[2]!r} twice.")
        sample[match[2]] = member
    if sample:
        yield _finished(sample, key, archive)


def _finished(sample: dict[str, Any], key: str | None, archive: str) -> InputRow:
    row: dict[str, Any] = {}
    for field, member in sample.items():
        with open_content(member) as stream:
            data = stream.read()
        decode = _DECODERS.get(uncompressed_name(field).rpartition(".")[2].lower())
        try:
            row[field] = data if decode is None else decode(data)
        except ValueError as error:
            return Unreadable(f"column {field!r} of sample {key!r} is not what its ending says: {error}")
    return {**row, "__key__": key, "__url__": archive}


def _is_hidden(path: str) -> bool:
    return any(part.startswith((".", "__")) and part != "." for part in path.split("/"))
