"""Which files hold a model's weights, and which tensors: read from the headers, never the values.

The files of a model may be in a local directory, in the datastore, or on the hub: ``ModelFiles`` is what all three offer.
"""

import json
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from metaflow_hf.errors import UnsupportedModelError
from metaflow_hf.store import ObjectStore
from metaflow_hf.store.manifests import Manifest

SAFETENSORS: Final = "model.safetensors"
PICKLE: Final = "pytorch_model.bin"
_OTHER_WEIGHTS: Final = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")
_READERS: Final = 8
_LENGTH_BYTES: Final = 8
_HEAD_BYTES: Final = 64 * 1024
# The limit of the format; more is not a header.
_MAX_HEADER_BYTES: Final = 100_000_000


class ModelFiles(Protocol):
    """The files of one model, by their paths relative to its directory."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """Path -> bytes."""

    def read(self, path: str, start: int, stop: int) -> bytes:
        """Bytes ``[start, stop)`` of a file."""


@dataclass(frozen=True, slots=True)
class DirectoryFiles:
    """The files of a local directory; of its subdirectories none."""

    directory: Path

    @property
    def sizes(self) -> Mapping[str, int]:
        return {path.name: path.stat().st_size for path in self.directory.iterdir() if path.is_file()}

    def read(self, path: str, start: int, stop: int) -> bytes:
        with (self.directory / path).open("rb") as file:
            file.seek(start)
            return file.read(stop - start)


@dataclass(frozen=True, slots=True)
class StoredFiles:
    """The files of a model or snapshot in the datastore."""

    store: ObjectStore
    manifest: Manifest

    @property
    def sizes(self) -> Mapping[str, int]:
        return {file.path: file.size for file in self.manifest.files}

    def read(self, path: str, start: int, stop: int) -> bytes:
        [blob] = [file.blob for file in self.manifest.files if file.path == path]
        return self.store.get_range(blob, start, stop)


def weight_files(files: ModelFiles, name: str, *, allow_pickle: bool) -> list[str]:
    """The files that transformers loads the weights from; ``name`` is what the user calls the model.

    Raises ``UnsupportedModelError`` for a model without weights, for one whose index names a missing file, and for pickled
    weights unless ``allow_pickle``.
    """
    sizes = files.sizes
    for whole in (SAFETENSORS, PICKLE):
        index = f"{whole}.index.json"
        if whole not in sizes and index not in sizes:
            continue
        if whole == PICKLE and not allow_pickle:
            break
        return [whole] if whole in sizes else _shards(files, index, name)
    if pickled := sorted(path for path in (PICKLE, f"{PICKLE}.index.json") if path in sizes):
        raise UnsupportedModelError(
            f"{name} has its weights only as pickle ({pickled[0]}), which can run any code when it is loaded: "
            "choose a revision with safetensors, or set model.allow_pickle: true if you trust it."
        )
    others = sorted(path for path in sizes if path.endswith(_OTHER_WEIGHTS))
    found = f", found {', '.join(others[:3])}" if others else ""
    raise UnsupportedModelError(
        f"{name} holds no weights that transformers loads: expected {SAFETENSORS} or {SAFETENSORS}.index.json{found}. Choose a "
        "model with weights, or set model.initialise: random."
    )


def is_safetensors(names: list[str]) -> bool:
    """Whether the files of ``weight_files`` are safetensors rather than pickle."""
    return all(name.endswith(".safetensors") for name in names)


def tensor_shapes(files: ModelFiles, names: list[str], name: str) -> dict[str, tuple[int, ...]]:
    """Tensor -> shape, from the headers of the safetensors files ``names``.

    Raises ``UnsupportedModelError`` for a file that is not complete.
    """
    with ThreadPoolExecutor(_READERS) as pool:
        headers = pool.map(lambda path: _header(files, path, name), names)
    return {tensor: tuple(about["shape"]) for header in headers for tensor, about in header.items()}


def _shards(files: ModelFiles, index: str, name: str) -> list[str]:
    sizes = files.sizes
    try:
        listed = json.loads(files.read(index, 0, sizes[index]))["weight_map"]
        shards = sorted({str(path) for path in listed.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnsupportedModelError(
            f"the {index} of {name} is not readable as the index of a checkpoint: {error!r:.80}. Get this file again."
        ) from error
    missing = [path for path in shards if path not in sizes]
    if missing or not shards:
        what = f"{len(missing)} of {len(shards)} files are missing ({', '.join(missing[:3])})"
        raise UnsupportedModelError(
            f"{name} is not complete: of the weights that {index} names {what}. Get the missing files."
        )
    return shards


def _header(files: ModelFiles, path: str, name: str) -> dict[str, Any]:
    size = files.sizes[path]
    # One request for most files: the first tensors come along.
    head = files.read(path, 0, min(_HEAD_BYTES, size))
    length = int.from_bytes(head[:_LENGTH_BYTES], "little")
    if size < _LENGTH_BYTES or length > min(_MAX_HEADER_BYTES, size - _LENGTH_BYTES):
        raise _damaged(path, name, f"it has {size:,} bytes and no header")
    try:
        text = head[_LENGTH_BYTES : _LENGTH_BYTES + length]
        text += (
            files.read(path, _LENGTH_BYTES + len(text), _LENGTH_BYTES + length) if len(text) < length else b""
        )
        header = json.loads(text)
        header.pop("__metadata__", None)
        stop = max((about["data_offsets"][1] for about in header.values()), default=0)
        whole = all(
            isinstance(about["shape"], list) and math.prod(about["shape"]) >= 0 for about in header.values()
        )
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise _damaged(path, name, "its header is not readable") from error
    expected = _LENGTH_BYTES + length + stop
    if not whole or expected != size:
        raise _damaged(path, name, f"it has {size:,} bytes, its header describes {expected:,}")
    return dict(header)


def _damaged(path: str, name: str, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{path} of {name} is not a complete safetensors file: {reason}. Get the file again (a pointer of Git LFS is replaced "
        "by its file with `git lfs pull`)."
    )
