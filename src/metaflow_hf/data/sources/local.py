"""Files and directories of this machine as sources of rows."""

import hashlib
import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

import xxhash

from metaflow_hf.data.sources.documents import only_documents
from metaflow_hf.data.sources.files import FileSource
from metaflow_hf.data.sources.readers import READABLE, holds_rows
from metaflow_hf.errors import SelectionError
from metaflow_hf.store.objects import encode_json

logger = logging.getLogger("metaflow_hf.data")

HASHERS: Final = 8


@dataclass(frozen=True, slots=True)
class LocalFile:
    """One file below a local directory, known by its name there."""

    name: str
    path: Path

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    def open(self) -> BinaryIO:
        return cast("BinaryIO", self.path.open("rb", buffering=0))


def open_local(path: Path) -> FileSource:
    """A file, a directory of files in the order of their names, a folder that ``save_to_disk`` made, or blocks.

    Files whose ending is not that of rows are left out; documents count where nothing else holds rows. Raises
    ``SelectionError`` when nothing is left, or the path does not exist or cannot be read.
    """
    # Imported here, because reading processes do not need the store, and it costs a third of their start.
    from metaflow_hf.data.sources.stored import source_of_blocks
    from metaflow_hf.store import open_store

    path = path.absolute()
    if (path / "block_manifest.json").is_file() or (path / "commits").is_dir():
        blocks = source_of_blocks(open_store(path), str(path))
        if blocks is not None:
            return blocks
    try:
        files = list(_find_files(path))
        digest = _digest(files)
    except OSError as error:
        raise SelectionError(f"{path} cannot be read: {error.strerror or error}.") from error
    if not files:
        raise SelectionError(
            f"{path} holds no file with rows; readable are {READABLE}; an archive only by its own name."
        )
    name = path.name.partition(".")[0] or path.name
    return FileSource(name=name, source=f"file:{path.name}", files=files, source_digest=digest)


def _find_files(path: Path) -> Iterator[LocalFile]:
    if not path.is_dir():
        yield LocalFile(path.name, path)
        return
    if (path / "dataset_dict.json").is_file():
        path = _choose_split(path)
    if (path / "state.json").is_file():
        state: dict[str, Any] = json.loads((path / "state.json").read_bytes())
        for entry in state["_data_files"]:
            yield LocalFile(entry["filename"], path / entry["filename"])
        return
    names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    visible = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
    rows = [name for name in visible if holds_rows(name)]
    chosen = set(rows or only_documents(visible))
    for name in visible:
        if name in chosen:
            yield LocalFile(name, path / name)
        else:
            logger.debug("%s: no rows in %s", path, name)


def _choose_split(path: Path) -> Path:
    splits: list[str] = json.loads((path / "dataset_dict.json").read_bytes())["splits"]
    if "train" in splits:
        return path / "train"
    if len(splits) == 1:
        return path / splits[0]
    raise SelectionError(f"{path} holds the splits {', '.join(splits)}: give the directory of one of them.")


def _digest(files: list[LocalFile]) -> str:
    """One digest for names, sizes and contents of all files: whether they changed, not whether somebody forged them."""

    def describe(file: LocalFile) -> list[Any]:
        with file.path.open("rb") as stream:
            return [file.name, file.size, hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()]

    with ThreadPoolExecutor(min(HASHERS, len(files) or 1)) as pool:
        listing = list(pool.map(describe, files))
    return hashlib.sha256(encode_json(listing)).hexdigest()
