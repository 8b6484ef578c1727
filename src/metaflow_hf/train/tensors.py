"""Files of named tensors, read and written one tensor at a time, in the safetensors format.

The bytes of a file depend on names and values alone, so equal weights have equal digests. safetensors' own
writer wants all tensors at once; this one holds one.
"""

import hashlib
import json
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

from metaflow_hf.errors import IntegrityError
from metaflow_hf.store.objects import Digest

_NAMES: Final[Mapping[torch.dtype, str]] = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.int64: "I64",
    torch.uint8: "U8",
}


# Less than this is hashed sooner than a thread is told to, and read sooner than mapped.
SMALL_BYTES: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class Layout:
    """Shape and dtype of one tensor that will be written."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class TensorReader:
    """The tensors of one file, mapped into memory and read when asked for; a context manager."""

    def __init__(self, path: Path) -> None:
        self._small: dict[str, Tensor] | None = None
        self._file: Any = None
        try:
            with path.open("rb", buffering=0) as file:
                head = file.read(SMALL_BYTES)
            if len(head) < SMALL_BYTES:
                self._small = load(head)
            else:
                self._file = safe_open(str(path), framework="pt")
        except (SafetensorError, OSError) as error:
            raise IntegrityError(f"{path.name} is not a readable safetensors file: {error}.") from error
        self.names: frozenset[str] = frozenset(self._file.keys() if self._small is None else self._small)

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name) if self._small is None else self._small[name]
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it from a mapped file."""
        if self._small is not None:
            return tuple(self._small[name].shape)
        return tuple(self._file.get_slice(name).get_shape())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.__exit__(kind, error, trace)


class TensorWriter:
    """Writes one file tensor by tensor; ``close`` completes it and returns its digest.

    Tensors must be given in the sorted order of the names of ``layouts``, whole by ``add`` or in flat pieces by
    ``extend``, on any device; anything else raises ``ValueError``, as does a ``close`` too early. What is written is
    hashed in a thread meanwhile, so it must not be changed any more. A context manager, which closes the file
    however it ends.
    """

    def __init__(self, path: Path, layouts: Mapping[str, Layout]) -> None:
        self._layouts = layouts
        self._due = deque(sorted(layouts))
        self._given = 0
        self._sha = hashlib.sha256()
        self._size = 0
        header = _header(self._due, layouts)
        self._hasher: ThreadPoolExecutor | None = None
        self._hashing: Future[None] | None = None
        self._file = path.open("wb")
        self._write(header)

    def add(self, name: str, tensor: Tensor) -> None:
        """Appends the tensor that is due next."""
        layout = self._layout_of(name)
        if tuple(tensor.shape) != layout.shape or self._given:
            raise ValueError(f"tensor {name!r} differs from its layout {layout}.")
        self.extend(name, tensor)

    def extend(self, name: str, values: Tensor) -> None:
        """Appends the next values of the tensor that is due."""
        layout = self._layout_of(name)
        data = values.detach().cpu().contiguous().reshape(-1)
        self._given += data.numel()
        size = torch.Size(layout.shape).numel()
        if data.dtype != layout.dtype or self._given > size:
            raise ValueError(f"tensor {name!r} differs from its layout {layout}.")
        self._write(data.view(torch.uint8).numpy())
        if self._given == size:
            self._given = 0
            self._due.popleft()

    def close(self) -> Digest:
        """Completes the file."""
        self._stop()
        if self._due:
            raise ValueError(f"tensor {self._due[0]!r} was not given.")
        return Digest(sha256=self._sha.hexdigest(), size=self._size)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._hasher is not None:
            self._hasher.shutdown()
        self._file.close()

    def _layout_of(self, name: str) -> Layout:
        if not self._due or name != self._due[0]:
            raise ValueError(f"tensor {name!r} is not the one that is due.")
        return self._layouts[name]

    def _write(self, data: Any) -> None:
        view = memoryview(data)
        if self._hashing is not None:
            self._hashing.result()
            self._hashing = None
        if view.nbytes < SMALL_BYTES:
            self._sha.update(view)
        else:
            if self._hasher is None:
                self._hasher = ThreadPoolExecutor(1, thread_name_prefix="sha256")
            self._hashing = self._hasher.submit(self._sha.update, view)
        self._file.write(view)
        self._size += view.nbytes


def write_tensors(path: Path, layouts: Mapping[str, Layout], tensors: Iterable[tuple[str, Tensor]]) -> Digest:
    """Writes a stream of named tensors to a file and returns its digest, holding one tensor at a time."""
    with TensorWriter(path, layouts) as writer:
        for name, tensor in tensors:
            writer.add(name, tensor)
        return writer.close()


def write_all(path: Path, tensors: Mapping[str, Tensor]) -> Digest:
    """Writes tensors that are at hand; see ``write_tensors``."""
    layouts = {name: Layout(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    return write_tensors(path, layouts, ((name, tensors[name]) for name in sorted(tensors)))


def _header(names: Iterable[str], layouts: Mapping[str, Layout]) -> bytes:
    entries: dict[str, Any] = {}
    offset = 0
    for name in names:
        layout = layouts[name]
        stop = offset + layout.num_bytes
        entries[name] = {
            "dtype": _NAMES[layout.dtype],
            "shape": list(layout.shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
