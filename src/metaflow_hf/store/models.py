"""Models in the store: a directory saved by a task, loadable anywhere by its reference or key."""

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, Final

from metaflow_hf.errors import IntegrityError, NotFound, SelectionError
from metaflow_hf.references import ModelRef, Reference, parse_reference
from metaflow_hf.store.blobs import Blobs, hash_file
from metaflow_hf.store.manifests import Manifest, ManifestFile, condemned_files, publish, read_manifest
from metaflow_hf.store.materialize import is_unfinished, materialize
from metaflow_hf.store.node_cache import NodeCache, Verify
from metaflow_hf.store.objects import ObjectStore, encode_json, quote_part

WORKERS: Final = 4
# What huggingface_hub leaves in a directory that it downloaded to.
_JUNK: Final = (".cache", "huggingface")


# The last part of a key is a file's name on local disk, 255 bytes at most, and ends with a digest.
MAX_LABEL_BYTES: Final = 220


def save_directory(
    store: ObjectStore,
    directory: str | Path,
    *,
    flow: str,
    run: str,
    step: str,
    task: str,
    label: str = "model",
    metadata: Mapping[str, Any] | None = None,
    pathspec: str = "",
) -> ModelRef:
    """Stores a directory (or a single file) as a model; bytes that the store already holds are not stored again.

    Visible only when complete: the manifest is created last. Saving equal content under an equal label and
    metadata in one task gives the same reference. Symbolic links are followed. Raises ``SelectionError`` when
    the path does not exist or holds no file, when ``metadata`` is not JSON, or for a label too long for a key.
    """
    return save_files(
        store,
        files_to_save(directory),
        flow=flow,
        run=run,
        step=step,
        task=task,
        label=label,
        metadata=metadata,
        pathspec=pathspec,
    )


def save_files(
    store: ObjectStore,
    sources: Mapping[str, Path],
    *,
    flow: str,
    run: str,
    step: str,
    task: str,
    label: str = "model",
    metadata: Mapping[str, Any] | None = None,
    pathspec: str = "",
) -> ModelRef:
    """As ``save_directory``, with the files (name -> path) that are chosen already."""
    if len(quote_part(label)) > MAX_LABEL_BYTES:
        raise SelectionError(
            f"the label {label[:40]!r}… of {len(label)} characters is too long: a key has room for {MAX_LABEL_BYTES} "
            "(more than one for each that is no letter, digit or '-_.'). Shorten it, and put the rest into metadata."
        )
    about = {"type": ModelRef.TYPE, "label": label, "metadata": check_metadata(metadata, "a model")}
    prefix = f"models/{quote_part(flow)}/{quote_part(run)}/{quote_part(step)}/{quote_part(task)}"
    while True:
        manifest = store_files(store, sources, about)
        key = f"{prefix}/{quote_part(label)}-{manifest.digest[:16]}.json"
        manifest = publish(store, key, manifest)
        if not condemned_files(store, manifest):
            break
        # A collection condemned a blob between our look and our manifest: the next generation is safe.
        store.delete(key)
    return ModelRef(
        key=key,
        digest=manifest.digest,
        size=manifest.size,
        num_files=len(manifest.files),
        created_on=datetime.now(UTC).isoformat(timespec="seconds"),
        pathspec=pathspec or f"{flow}/{run}/{step}/{task}",
        metadata=dict(metadata or {}),
        label=label,
    )


def load_directory(
    store: ObjectStore,
    reference: Reference | Mapping[str, Any] | str,
    target: str | Path | None = None,
    *,
    cache: NodeCache | None = None,
    verify: Verify = "once",
    temp_dir_root: str | Path | None = None,
) -> Path:
    """The files of a snapshot, model or checkpoint as a directory, by its reference or key.

    Into ``target``: real, writable files; what else lies there stays. Without it a fresh directory, whose large
    files are read-only links into the node's cache; the caller removes it. Raises ``SelectionError`` for what is
    no reference, ``NotFound`` when nothing is stored under it (any more), ``IntegrityError`` for damaged bytes.
    """
    _, manifest = find_manifest(store, reference)
    cache = cache or NodeCache.default()
    if target is not None:
        return materialize(store, manifest, Path(target), cache=cache, verify=verify)
    root = None if temp_dir_root is None else Path(temp_dir_root)
    label = quote_part(str(manifest.about.get("label") or manifest.about.get("repo_id") or "model"))
    work = cache.new_work_dir(label[:60], root=root)
    return materialize(store, manifest, work, cache=cache, verify=verify, link_large=True)


def find_manifest(store: ObjectStore, reference: Reference | Mapping[str, Any] | str) -> tuple[str, Manifest]:
    """The key and content of the manifest that a reference or key leads to; errors as ``load_directory``."""
    if isinstance(reference, str):
        key, digest = reference, None
    else:
        known = reference if isinstance(reference, Reference) else parse_reference(reference)
        key, digest = known.key, known.digest
    try:
        if key.startswith("snapshots/"):
            entry = read_manifest_pointer(store, key)
            return entry, read_manifest(store, entry, digest=digest)
        return key, read_manifest(store, key, digest=digest)
    except NotFound as error:
        raise _gone(store, key) from error


def find_reference(store: ObjectStore, key: str) -> ModelRef:
    """The reference of the model under ``key``. Raises ``NotFound``, and ``SelectionError`` for what is no model."""
    _, manifest = find_manifest(store, key)
    if manifest.about.get("type") != ModelRef.TYPE:
        raise SelectionError(f"{key!r} is a {manifest.about.get('type')}, not a model.")
    return ModelRef(
        key=key,
        digest=manifest.digest,
        size=manifest.size,
        num_files=len(manifest.files),
        created_on=store.head(key).last_modified.isoformat(timespec="seconds"),
        pathspec="/".join(key.split("/")[1:5]),
        metadata=dict(manifest.about.get("metadata") or {}),
        label=str(manifest.about.get("label", "")),
    )


def _gone(store: ObjectStore, key: str) -> NotFound:
    return NotFound(
        f"nothing is stored under {key!r} in {store.uri}: it was deleted, or was written to another datastore."
    )


def read_manifest_pointer(store: ObjectStore, key: str) -> str:
    """The key of the manifest that a scoped entry names. Raises ``NotFound``, ``IntegrityError``."""
    import json

    try:
        return str(json.loads(store.get(key))["manifest"])
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"the entry {store.uri}/{key} is damaged: {error}.") from error


def store_files(store: ObjectStore, sources: Mapping[str, Path], about: Mapping[str, Any]) -> Manifest:
    """Stores the files' bytes where they are missing; the manifest is not published yet. Raises ``IntegrityError`` for
    one that somebody changes or removes meanwhile.

    Whoever publishes it looks afterwards whether one of its blobs was condemned in the meantime.
    """
    blobs = Blobs(store)

    def save(item: tuple[str, Path]) -> ManifestFile:
        name, path = item
        try:
            digest = hash_file(path)
            blob = blobs.put(path, digest)
        except (IntegrityError, FileNotFoundError, NotFound) as error:
            raise IntegrityError(
                f"{path} was changed or removed while it was being saved: save once nobody writes there any more. Nothing "
                "was saved."
            ) from error
        return ManifestFile(path=name, size=digest.size, sha256=digest.sha256, blob=blob)

    with ThreadPoolExecutor(min(WORKERS, len(sources))) as pool:
        return Manifest(files=tuple(pool.map(save, sources.items())), about=about)


def files_to_save(directory: str | Path) -> dict[str, Path]:
    """Relative name -> path of every file below a directory, or of a single file.

    Symbolic links are followed; what another load is still writing there, or left when it was killed, is no content.
    Raises ``SelectionError`` when there is none, or one that cannot be read as a file.
    """
    place = Path(directory)
    sources = dict(_files(place))
    if not sources:
        raise SelectionError(
            f"there is nothing to save at {str(place)!r}: it does not exist or holds no file."
        )
    return sources


def check_metadata(metadata: Mapping[str, Any] | None, what: str) -> dict[str, Any]:
    """A copy of the user's metadata. Raises ``SelectionError`` unless it is JSON."""
    try:
        plain = dict(metadata or {})
        encode_json(plain)
    except (TypeError, ValueError) as error:
        raise SelectionError(f"the metadata of {what} must be JSON: {error}.") from error
    return plain


def _files(place: Path) -> Iterator[tuple[str, Path]]:
    if place.is_file():
        yield place.name, place
        return
    for folder, folders, names in os.walk(place, followlinks=True):
        here = Path(folder)
        relative = here.relative_to(place)
        above = islice(here.parents, len(relative.parts))
        if here.resolve() in (parent.resolve() for parent in above):
            # A link that leads back to where it lies. One to a directory beside it is a second name of its files.
            folders.clear()
            continue
        folders[:] = [name for name in folders if (relative / name).parts != _JUNK]
        for name in names:
            path = here / name
            if is_unfinished(name):
                continue
            if not path.is_file():
                raise SelectionError(
                    f"{path} is not a regular file, or a link to nothing: it cannot be saved."
                )
            yield (relative / name).as_posix(), path


def delete_reference(store: ObjectStore, reference: Reference | Mapping[str, Any] | str) -> None:
    """Removes what a reference or key leads to, but no blob: those go when nothing refers to them any more.

    Of a snapshot only the entry of its scope goes. Raises ``NotFound`` when there is nothing, ``SelectionError`` for a
    key that is no entry, model or checkpoint.
    """
    key = reference if isinstance(reference, str) else _key_of(reference)
    if not key.startswith(("snapshots/", "models/", "checkpoints/")):
        raise SelectionError(f"{key!r} is not the key of a snapshot's entry, a model or a checkpoint.")
    try:
        store.head(key)
    except NotFound as error:
        raise _gone(store, key) from error
    store.delete(key)


def _key_of(reference: Reference | Mapping[str, Any]) -> str:
    return reference.key if isinstance(reference, Reference) else parse_reference(reference).key
