"""The files in a zip archive, as if each lay beside it."""

import io
import lzma
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, Final, cast

from metaflow_hf.data.sources.compression import READ_BYTES, OpenableFile, damage_named
from metaflow_hf.errors import SelectionError

ARCHIVE: Final = ".zip"
_ENCRYPTED: Final = 0x1
_DAMAGE: Final = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError)


@dataclass(frozen=True, slots=True)
class Member:
    """One file of an open archive, known to people by both names."""

    name: str
    _archive: zipfile.ZipFile
    _info: zipfile.ZipInfo

    def open(self) -> BinaryIO:
        """The content as a seekable stream; its checksum is compared at the end."""
        if self._info.flag_bits & _ENCRYPTED:
            raise SelectionError(f"{self.name} is encrypted: unpack the archive first.")
        return cast("BinaryIO", self._archive.open(self._info))


@contextmanager
def opened_archive(file: OpenableFile) -> Iterator[list[Member]]:
    """The members of an archive in the order of their names, without hidden ones.

    Raises ``IntegrityError`` naming the archive when it is damaged.
    """
    with (
        file.open() as stored,
        damage_named(file.name, *_DAMAGE),
        io.BufferedReader(cast("io.RawIOBase", stored), READ_BYTES) as stream,
        zipfile.ZipFile(stream) as archive,
    ):
        yield [
            Member(f"{file.name}/{info.filename}", archive, info)
            for info in sorted(archive.infolist(), key=lambda info: info.filename)
            if not info.is_dir()
            and not any(part.startswith((".", "__")) for part in info.filename.split("/"))
        ]
