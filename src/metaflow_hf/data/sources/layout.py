"""Which files of a repository are the rows of one configuration and split: `datasets` decides, as the hub does."""

import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metaflow_hf.data.sources.documents import only_documents
from metaflow_hf.data.sources.readers import READABLE, file_format, holds_rows
from metaflow_hf.errors import SelectionError


@dataclass(frozen=True, slots=True)
class Layout:
    """The files of one split, in order."""

    config: str
    split: str
    paths: list[str]


def documents_of(paths: Iterable[str]) -> Layout | None:
    """All documents of a repository that holds nothing else that could be read, or ``None``."""
    names = list(paths)
    documents = [] if any(map(holds_rows, names)) else only_documents(names)
    return Layout("documents", "train", documents) if documents else None


def layout_of_builder(
    builder: Any, split: str | None, path_of: Callable[[str], str], *, where: str
) -> Layout:
    """The split's files, as a builder of `datasets` found them under addresses that ``path_of`` understands.

    Raises ``SelectionError`` for an unknown split, and for files that hold no text.
    """
    files: Mapping[str, list[str]] = builder.config.data_files or {}
    config, splits = str(builder.config.name), list(map(str, files))
    split = split or ("train" if "train" in splits or len(splits) != 1 else splits[0])
    if split not in splits:
        raise SelectionError(
            f"{where}: there is no split {split!r} in configuration {config!r}, only {', '.join(splits) or 'none'}. "
            f"Name one: {where}:{config}:SPLIT."
        )
    paths = [path_of(str(address)) for address in files[split]]
    unreadable = [path for path in paths if file_format(path) is None]
    if unreadable or not paths:
        raise SelectionError(
            f"{where}: split {split!r} has no files with rows of text "
            f"({', '.join(unreadable[:3]) or 'no files at all'}); rows are read from {READABLE}. Hubs keep many datasets "
            f"as parquet too: try {where}@refs/convert/parquet. Or convert it yourself with datasets' save_to_disk, "
            "and name that folder."
        )
    return Layout(config, split, paths)


def refusal(error: Exception, config: str | None, *, where: str, path: str, **access: Any) -> str:
    """Why `datasets` makes no builder of the repository or directory at ``path``, for a message.

    ``access`` are the arguments that a repository takes: revision and token.
    """
    import datasets

    with suppress(ValueError, OSError):
        known = datasets.get_dataset_config_names(path, **access)
        one_of = f"{', '.join(known)}. Name one: {where}:CONFIGURATION."
        if config is not None and config not in known:
            return f"{where}: there is no configuration {config!r}, only {one_of}"
        if config is None and datasets.get_dataset_default_config_name(path, **access) is None:
            return f"{where} has several configurations: {one_of}"
    return f"{where} cannot be read as a dataset: {str(error).partition(chr(10))[0]}"


def layout_of_files(
    paths: Iterable[str], readme: bytes | None, config: str | None, split: str | None, *, where: str
) -> Layout:
    """The same without a hub, by the names of all files and by the description that they may have.

    Raises ``SelectionError`` for an unknown configuration too.
    """
    import datasets

    names = list(paths)
    documents = documents_of(names)
    if documents is not None:
        return documents
    with tempfile.TemporaryDirectory(prefix="layout-") as directory:
        # Only the names count: nothing is read before rows are asked for.
        root = Path(directory, "repository").resolve()
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).touch()
        if readme is not None:
            (root / "README.md").write_bytes(readme)
        try:
            builder = datasets.load_dataset_builder(
                str(root), name=config, cache_dir=str(Path(directory, "cache"))
            )
        except zipfile.BadZipFile as error:
            raise SelectionError(
                f"{where} is archives, which are read from the hub itself: give hf://…, or build blocks once."
            ) from error
        except (ValueError, FileNotFoundError) as error:
            reason = refusal(error, config, where=where, path=str(root))
            raise SelectionError(reason.replace(str(root), where)) from error
        return layout_of_builder(
            builder, split, lambda path: Path(path).relative_to(root).as_posix(), where=where
        )
