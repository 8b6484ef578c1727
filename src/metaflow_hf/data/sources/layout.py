"""Which files of a repository or directory are the rows of one configuration and split: `datasets` decides.

It is shown an empty copy of the names, without the files that hold no rows of a dataset: licences and other files
about the repository, documents, pictures. Then the same names give the same files on a hub, in a store, on this
machine, and in an archive.
"""

import dataclasses
import logging
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Final

from metaflow_hf.data.sources.about import is_about
from metaflow_hf.data.sources.archives import ARCHIVES, ZIP, opened_archive
from metaflow_hf.data.sources.cutting import cut
from metaflow_hf.data.sources.documents import only_documents
from metaflow_hf.data.sources.readers import READABLE, file_format, holds_rows
from metaflow_hf.data.sources.splits import SplitPart, choose_splits
from metaflow_hf.data.sources.views import NO_OPTIONS, FileView, ReadOptions, SizedFile
from metaflow_hf.errors import SelectionError

logger = logging.getLogger("metaflow_hf.data")

README: Final[str] = "README.md"
# Another description that `datasets` knows.
CONFIGURATION: Final[str] = ".huggingface.yaml"
# Endings that `datasets` does not know, and the ones that it reads in the same way.
_SAME_AS: Final = {".jsonlines": ".jsonl", ".feather": ".arrow", ".text": ".txt"}
# More archives than these are taken to hold what the first one does.
_SHOWN_ARCHIVES: Final = 20
# What a configuration may say that does not change the rows.
_IGNORED: Final = frozenset(
    [
        "name",
        "version",
        "data_dir",
        "data_files",
        "description",
        "features",
        "use_threads",
        "block_size",
        "chunksize",
        "batch_size",
        "on_mixed_types",
        "parse_agent_traces",
        "newlines_in_values",
        "mangle_dupe_cols",
        "verbose",
        "memory_map",
    ]
)


@dataclass(frozen=True, slots=True)
class Layout:
    """The files of the parts of a split, in order, and how they are read."""

    config: str
    split: str
    parts: Sequence[tuple[SplitPart, list[str]]]
    options: ReadOptions = field(default=NO_OPTIONS)

    @property
    def paths(self) -> list[str]:
        return [path for _, paths in self.parts for path in paths]

    def files(self, open_path: Callable[[str], SizedFile], *, where: str) -> list[SizedFile]:
        """The files as they are read: with the options of the configuration, cut where a part is a slice."""

        def view(path: str) -> SizedFile:
            file = open_path(path)
            return file if self.options == NO_OPTIONS else FileView(file, self.options)

        return [file for part, paths in self.parts for file in cut(list(map(view, paths)), part, where=where)]


def layout_of_splits(
    splits: Mapping[str, Sequence[str]], split: str | None, *, where: str, config: str = "default"
) -> Layout:
    """The layout of splits whose files are known. Raises ``SelectionError`` for an unknown split."""
    parts = choose_splits(split, list(splits), where=where, config=config)
    named = "+".join(part.instruction or part.split for part in parts)
    return Layout(config, named, [(part, list(splits[part.split])) for part in parts])


def documents_of(paths: Iterable[str]) -> list[str]:
    """All documents of a repository that holds nothing else that could be read, or none."""
    names = list(paths)
    return [] if any(map(_may_hold_rows, names)) else only_documents(names)


def layout_of_files(
    paths: Iterable[str],
    descriptions: Mapping[str, bytes],
    config: str | None,
    split: str | None,
    *,
    where: str,
    open_path: Callable[[str], SizedFile] | None = None,
) -> Layout:
    """The files of one configuration and split.

    Args:
        paths: The names of all files.
        descriptions: The contents of ``README.md`` and ``.huggingface.yaml``, if there are any.
        config: The configuration; by default the only one, or the one that is marked as default.
        split: The split, as in ``choose_splits``.
        where: The location, for messages.
        open_path: Opens a zip archive, whose members decide its format.

    Raises:
        SelectionError: There is no such configuration or split, or no file with rows.

    """
    names = list(paths)
    documents = documents_of(names)
    if documents:
        return layout_of_splits({"train": documents}, split, where=where, config="documents")
    rows = [name for name in names if _may_hold_rows(name)]
    if about := [name for name in names if is_about(name)]:
        logger.info("%s: texts about the dataset are no rows of it: %s", where, ", ".join(about))
    if not rows:
        raise SelectionError(_nothing_readable(names, where))
    with tempfile.TemporaryDirectory(prefix="layout-") as directory:
        # Only the names count: nothing is read before rows are asked for.
        root = Path(directory, "repository").resolve()
        root.mkdir()
        known = {_known_name(name): name for name in rows}
        for shown in known:
            (root / shown).parent.mkdir(parents=True, exist_ok=True)
            (root / shown).touch()
        if open_path is not None:
            _show_archives(root, rows, open_path)
        for name, content in descriptions.items():
            (root / name).write_bytes(content)
        builder = _builder(root, config, directory, where=where)
        splits = {
            str(name): [known[Path(str(path)).relative_to(root).as_posix()] for path in found]
            for name, found in (builder.config.data_files or {}).items()
        }
        if len(builder.builder_configs) <= 1:
            _warn_of_others(rows, splits, where)
        layout = layout_of_splits(splits, split, where=where, config=str(builder.config.name))
        return dataclasses.replace(layout, options=_options(builder.config, where))


def _builder(root: Path, config: str | None, directory: str, *, where: str) -> Any:
    import datasets
    import yaml

    try:
        return datasets.load_dataset_builder(str(root), name=config, cache_dir=str(Path(directory, "cache")))
    except zipfile.BadZipFile as error:
        raise SelectionError(
            f"{where} is archives that are not on this machine, or damaged: download and unpack them, or name one."
        ) from error
    except yaml.YAMLError as error:
        raise SelectionError(f"{where}: the header of {README} is not YAML: {error}.") from error
    except (ValueError, FileNotFoundError, TypeError) as error:
        reason = _refusal(error, config, where=where, path=str(root))
        raise SelectionError(reason.replace(str(root), where)) from error


def _refusal(error: Exception, config: str | None, *, where: str, path: str) -> str:
    """Why `datasets` makes no builder of the directory at ``path``, for a message."""
    import datasets

    with suppress(ValueError, OSError):
        known = datasets.get_dataset_config_names(path)
        one_of = f"{', '.join(known)}. Name one: {where}:CONFIGURATION."
        if config is not None and config not in known:
            return f"{where}: there is no configuration {config!r}, only {one_of}"
        if config is None and datasets.get_dataset_default_config_name(path) is None:
            return f"{where} has several configurations: {one_of}"
    return f"{where} cannot be read as a dataset: {str(error).partition(chr(10))[0]}"


def _options(config: Any, where: str) -> ReadOptions:
    """How a configuration says that its files are read. Raises ``SelectionError`` for what is not done here."""
    given = {
        option.name: getattr(config, option.name)
        for option in dataclasses.fields(config)
        if option.name not in _IGNORED and getattr(config, option.name) != option.default
    }
    # `datasets` copies the one to the other.
    delimiter = given.pop("delimiter", None) or given.get("sep")
    columns = given.pop("column_names", None) or given.get("names")
    options = ReadOptions(delimiter, None if columns is None else tuple(columns), given.pop("field", None))
    unknown = {name: value for name, value in given.items() if name not in ("sep", "names")}
    if str(unknown.get("encoding", "")).lower().replace("_", "-") in ("utf-8", "utf8"):
        del unknown["encoding"]
    if columns is not None and "header" in unknown and unknown["header"] is None:
        del unknown["header"]
    if unknown:
        said = ", ".join(f"{name}: {value!r}" for name, value in unknown.items())
        raise SelectionError(
            f"{where}: configuration {config.name!r} says how its files are read ({said}), which is not supported. "
            "Convert it with `datasets`: load_dataset(…).save_to_disk(…), and name that folder."
        )
    return options


def _show_archives(root: Path, names: Sequence[str], open_path: Callable[[str], SizedFile]) -> None:
    """Puts the names of their members into the archives of the copy, where archives may be what is most common."""
    archives = [name for name in names if name.lower().endswith(ZIP)]
    if 2 * len(archives) < len(names):
        return
    for name in archives[:_SHOWN_ARCHIVES]:
        with opened_archive(open_path(name)) as members, zipfile.ZipFile(root / name, "w") as shown:
            for member in members:
                shown.writestr(member.path, b"")
    for name in archives[_SHOWN_ARCHIVES:]:
        shutil.copyfile(root / archives[0], root / name)


def _known_name(name: str) -> str:
    """A name by which `datasets` knows the format."""
    ending = file_format(name) or ""
    known = _SAME_AS.get(ending, ending)
    suffixes = [f".{suffix}" for suffix in PurePosixPath(name).name.split(".")[1:]]
    return name if known in suffixes else f"{name}{known}"


def _warn_of_others(names: Sequence[str], splits: Mapping[str, Sequence[str]], where: str) -> None:
    """`datasets` reads files of one format only: the one that most files have."""
    chosen = {name for found in splits.values() for name in found}
    formats = {file_format(name) for name in chosen}
    others = [name for name in names if name not in chosen and file_format(name) not in formats]
    if others:
        logger.warning(
            "%s holds files of several formats, of which the most common one is read: %s left out (%s); name a file or "
            "a pattern (%s/*%s) to read them",
            where,
            f"{len(others)} are" if len(others) > 1 else "1 is",
            ", ".join(others[:3]),
            where,
            file_format(others[0]),
        )


def _may_hold_rows(name: str) -> bool:
    return holds_rows(name) or file_format(name) in ARCHIVES


def _nothing_readable(names: Sequence[str], where: str) -> str:
    others = [name for name in names if name != README and not name.startswith(".")]
    listed = ", ".join(others[:3]) or "no files at all"
    hint = "Or convert it with datasets' save_to_disk, and name that folder."
    if where.startswith("hf://"):
        hint = f"Hubs keep many datasets as parquet too: try {where}@refs/convert/parquet. {hint}"
    return (
        f"{where} has no files with rows of text ({listed}); rows are read from {READABLE}, and an archive among "
        f"others only where it holds such files. {hint}"
    )
