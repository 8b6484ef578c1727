"""Turns a manifest into a directory of files.

Small files, the ones that people edit, are copied. Large ones are reflinked where the file system can, else
hard-linked read-only from the node's cache, so that a gigabyte takes no time and no space. A target that the
caller names gets real, writable copies only. Nothing ever links into the datastore.
"""

import os
import re
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from metaflow_hf.errors import ContentLost, IntegrityError, NotFound, SelectionError, StoreUnavailable
from metaflow_hf.store.manifests import Manifest, ManifestFile
from metaflow_hf.store.node_cache import NodeCache, Verify
from metaflow_hf.store.objects import ObjectStore, new_nonce
from metaflow_hf.store.streams import hard_link, reflink

LARGE_BYTES: Final = 16 << 20
WORKERS: Final = 8
# A file on its way, beside its place; a killed load leaves it there, in a directory that may be saved later.
_PART: Final = ".metaflow-hf-{}.part"
_IS_PART: Final = re.compile(r"\.metaflow-hf-[0-9a-f]{12}\.part")


def materialize(
    store: ObjectStore,
    manifest: Manifest,
    target: Path,
    *,
    cache: NodeCache,
    verify: Verify = "once",
    link_large: bool = False,
) -> Path:
    """Writes the manifest's files below ``target`` and returns it; what else lies there stays untouched.

    Each file appears whole, by a rename, also over an earlier version of itself. ``link_large`` allows
    read-only hard links for files of 16 MiB and more; otherwise all are writable and the caller's own. Raises
    ``IntegrityError`` for damaged and ``ContentLost`` for missing bytes, naming the file, ``StoreUnavailable`` as the
    store does, and ``SelectionError`` when a directory, or a link that leads elsewhere, stands where a file belongs.
    """

    def write(file: ManifestFile) -> None:
        place = target / file.path
        if place.is_dir() and not place.is_symlink():
            raise SelectionError(
                f"{place} is a directory, but the file {file.path!r} belongs there: load elsewhere."
            )
        _check_below(place, root)
        place.parent.mkdir(parents=True, exist_ok=True)
        link = link_large and file.size >= LARGE_BYTES
        try:
            _write_file(_fetch(cache, store, file, verify), place, file, link=link)
        except FileNotFoundError:
            # Another process took it out of the cache between the look and the copy.
            _write_file(_fetch(cache, store, file, verify), place, file, link=link)

    try:
        target.mkdir(parents=True, exist_ok=True)
        root = target.resolve()
        with ThreadPoolExecutor(min(WORKERS, len(manifest.files) or 1)) as pool:
            _finish(pool.map(write, manifest.files))
    except OSError as error:
        if isinstance(error, StoreUnavailable):
            raise
        raise StoreUnavailable(
            f"the files cannot be written to {target}: {error.strerror or error}. Make room there or choose another "
            "path."
        ) from error
    return target


def is_unfinished(name: str) -> bool:
    """Whether a file name is one that a load gives to what is not yet complete: nobody's content."""
    return _IS_PART.fullmatch(name) is not None


def _fetch(cache: NodeCache, store: ObjectStore, file: ManifestFile, verify: Verify) -> Path:
    try:
        return cache.fetch(store, file, verify=verify)
    except NotFound as error:
        raise ContentLost(f"the bytes of {file.path!r} are gone from the datastore: {error}") from error
    except IntegrityError as error:
        raise IntegrityError(f"the stored bytes of {file.path!r} are wrong: {error}") from error


def _check_below(place: Path, root: Path) -> None:
    """Refuses a folder of the target that is a link to elsewhere: what lies there is not ours to overwrite."""
    # Unlike resolve(), this says where links lead that go round in circles.
    parent = Path(os.path.realpath(place.parent))
    if not parent.is_relative_to(root):
        raise SelectionError(
            f"{place.parent} is, or lies behind, a link to {parent}, outside of the directory that is loaded into: "
            "remove the link, or load elsewhere."
        )


def _finish(results: Iterable[None]) -> None:
    for _ in results:
        pass


def _write_file(source: Path, place: Path, file: ManifestFile, *, link: bool) -> None:
    part = place.with_name(_PART.format(new_nonce()[:12]))
    try:
        if not _reflink(source, part) and not (link and hard_link(source, part)):
            shutil.copyfile(source, part)
        if part.stat().st_size != file.size:
            raise IntegrityError(f"{place} was cut short while it was copied from the node's cache.")
        part.replace(place)
    finally:
        part.unlink(missing_ok=True)


def _reflink(source: Path, place: Path) -> bool:
    with place.open("xb") as writer:
        if reflink(source, writer.fileno()):
            return True
    place.unlink()
    return False
