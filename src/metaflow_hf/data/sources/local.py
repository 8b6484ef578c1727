"""Files and directories of this machine as sources of rows."""

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

import xxhash

from metaflow_hf.data.sources.archives import TAR, ZIP, opened_archive, opened_tar
from metaflow_hf.data.sources.cutting import cut
from metaflow_hf.data.sources.files import FileSource
from metaflow_hf.data.sources.layout import CONFIGURATION, README, Layout, layout_of_files, layout_of_splits
from metaflow_hf.data.sources.readers import file_format, is_table
from metaflow_hf.data.sources.views import FileView, SizedFile
from metaflow_hf.errors import SelectionError
from metaflow_hf.store.objects import encode_json

HASHERS: Final = 8
_SUFFIX: Final = re.compile(r"(?P<config>[^:/]*)(?::(?P<split>[^/]*))?")
_POINTER: Final = b"version https://git-lfs.github.com/spec/"
_POINTER_BYTES: Final = 1024


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


@dataclass(frozen=True, slots=True)
class LocalPlace:
    """What a path names: a file, a directory or a pattern, with a configuration and a split behind colons."""

    path: Path
    config: str | None = None
    split: str | None = None

    @classmethod
    def parse(cls, path: Path) -> "LocalPlace":
        """`path:config:split` only where no path of that name exists, and the part before a colon does."""
        text = str(path)
        if not _exists(text):
            for colon in reversed([match.start() for match in re.finditer(":", text)]):
                named = _SUFFIX.fullmatch(text[colon + 1 :])
                if named is not None and _exists(text[:colon]):
                    return cls(Path(text[:colon]), named["config"] or None, named["split"] or None)
        return cls(path)

    @property
    def exists(self) -> bool:
        return _exists(str(self.path))


@dataclass(frozen=True, slots=True)
class _Found:
    """The files of a place by the paths that its layout names."""

    layout: Layout
    files: Mapping[str, LocalFile]
    # Of an archive the paths are those of its members.
    archive: LocalFile | None = None

    @property
    def read(self) -> list[LocalFile]:
        """The files that are read, in order."""
        paths = dict.fromkeys(self.layout.paths)
        return [self.archive] if self.archive is not None else [self.files[path] for path in paths]

    def views(self, where: str) -> list[SizedFile]:
        archive = self.archive
        if archive is None:
            return self.layout.files(self.files.__getitem__, where=where)
        return [
            view
            for part, members in self.layout.parts
            for view in cut([FileView(archive, members=tuple(members))], part, where=where)
        ]


def open_local(path: Path, split: str | None = None) -> FileSource:
    """The rows of a file, a directory, a pattern (`data/*.jsonl`), a folder of `save_to_disk`, or blocks.

    Args:
        path: The path, which may name a configuration and a split: `directory:config:split`.
        split: The split, in place of one in the path; `train` by default.

    Raises:
        SelectionError: Nothing is there, nothing of it holds rows, it cannot be read, or it has no such configuration
            or split.

    """
    # Imported here, because reading processes do not need the store, and it costs a third of their start.
    from metaflow_hf.data.sources.stored import source_of_blocks
    from metaflow_hf.store import open_store

    place = LocalPlace.parse(path.absolute())
    split, where = split or place.split, str(place.path)
    if (place.path / "block_manifest.json").is_file() or (place.path / "commits").is_dir():
        blocks = source_of_blocks(open_store(place.path), where, split)
        if blocks is not None:
            _refuse_configuration(place)
            return blocks
    try:
        found = _find(place, split)
        _refuse_pointers(found.read)
        digest = _digest(found.read)
    except OSError as error:
        raise SelectionError(f"{where} cannot be read: {error.strerror or error}.") from error
    stem = place.path.name if not _is_pattern(where) else _base(place.path).name
    named = found.layout.split if place.config or found.layout.split != "train" else ""
    return FileSource(
        name=stem.partition(".")[0] or stem,
        source=f"file:{place.path.name}" + (f":{place.config or ''}:{named}" if named else ""),
        files=found.views(where),
        source_digest=digest,
    )


def _find(place: LocalPlace, split: str | None) -> _Found:
    path, where = place.path, str(place.path)
    if path.is_dir():
        saved = _saved_splits(path)
        if saved is None:
            return _find_by_names(place, path, _visible(path), split)
        _refuse_configuration(place)
        layout = layout_of_splits({name: list(files) for name, files in saved.items()}, split, where=where)
        return _Found(layout, {key: file for files in saved.values() for key, file in files.items()})
    if _is_pattern(where):
        base = _base(path)
        matches = [Path(match) for match in sorted(_matches(where))]
        names = [match.relative_to(base).as_posix() for match in matches if match.is_file()]
        return _find_by_names(place, base, names, split)
    _refuse_configuration(place)
    file = LocalFile(path.name, path)
    members = _archive_members(file)
    if members is None:
        return _Found(layout_of_splits({"train": [file.name]}, split, where=where), {file.name: file})
    return _Found(layout_of_files(members, {}, None, split, where=where), {}, archive=file)


def _find_by_names(place: LocalPlace, base: Path, names: Sequence[str], split: str | None) -> _Found:
    if not names:
        raise SelectionError(f"{place.path} holds no files.")
    descriptions = {
        name: (base / name).read_bytes() for name in (README, CONFIGURATION) if (base / name).is_file()
    }
    layout = layout_of_files(
        names,
        {} if _is_pattern(str(place.path)) else descriptions,
        place.config,
        split,
        where=str(place.path),
        open_path=lambda name: LocalFile(name, base / name),
    )
    return _Found(layout, {name: LocalFile(name, base / name) for name in names})


def _saved_splits(path: Path) -> dict[str, dict[str, LocalFile]] | None:
    """The splits of a folder of ``save_to_disk``, or ``None``."""
    if (path / "dataset_dict.json").is_file():
        splits: list[str] = json.loads((path / "dataset_dict.json").read_bytes())["splits"]
        return {split: _saved_files(path / split, split) for split in splits}
    if (path / "state.json").is_file():
        return {"train": _saved_files(path, "train")}
    return None


def _saved_files(path: Path, split: str) -> dict[str, LocalFile]:
    state: dict[str, Any] = json.loads((path / "state.json").read_bytes())
    names = [entry["filename"] for entry in state["_data_files"]]
    return {f"{split}/{name}": LocalFile(name, path / name) for name in names}


def _archive_members(file: LocalFile) -> list[str] | None:
    """The names in an archive of files; ``None`` for other files, and for an archive of webdataset samples."""
    ending = file_format(file.name)
    if ending == ZIP:
        with opened_archive(file) as members:
            return [member.path for member in members]
    if ending == TAR:
        with opened_tar(file) as members:
            paths = [member.path for member in members]
        return paths if any(map(is_table, paths)) else None
    return None


def _visible(path: Path) -> list[str]:
    names = []
    for folder, folders, found in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names += [Path(folder, name) for name in found if not name.startswith(".")]
    return sorted(name.relative_to(path).as_posix() for name in names if name.is_file())


def _exists(text: str) -> bool:
    return os.path.lexists(text) or (_is_pattern(text) and next(_matches(text), None) is not None)


def _matches(pattern: str) -> Iterator[str]:
    # Path.glob gives hidden files too, and refuses `**.jsonl`.
    return glob.iglob(pattern, recursive=True)  # noqa: PTH207


def _is_pattern(text: str) -> bool:
    return glob.has_magic(text) and not os.path.lexists(text)


def _base(pattern: Path) -> Path:
    """The directory below which a pattern is matched."""
    return next(parent for parent in pattern.parents if not glob.has_magic(str(parent)))


def _refuse_configuration(place: LocalPlace) -> None:
    if place.config is not None:
        raise SelectionError(
            f"{place.path} has no configurations; a split of it is named with two colons: {place.path}::SPLIT."
        )


def _refuse_pointers(files: Sequence[LocalFile]) -> None:
    for file in files:
        if file.size < _POINTER_BYTES and file.path.read_bytes().startswith(_POINTER):
            raise SelectionError(
                f"{file.path} is a pointer of Git LFS, not the file itself: run `git lfs pull` in its repository."
            )


def _digest(files: Sequence[LocalFile]) -> str:
    """One digest for names, sizes and contents of all files: whether they changed, not whether somebody forged them."""

    def describe(file: LocalFile) -> list[Any]:
        with file.path.open("rb") as stream:
            return [file.name, file.size, hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()]

    with ThreadPoolExecutor(min(HASHERS, len(files) or 1)) as pool:
        listing = list(pool.map(describe, files))
    return hashlib.sha256(encode_json(listing)).hexdigest()
