"""A directory that exists in a dict alone, for code that only needs a few verbs of ``pathlib.Path``."""

import io
from collections.abc import Iterator


class MemoryPath:
    """What the worker's code asks of a path, without a file system below it: tens of thousands of schedules write
    files of a few bytes, and a kernel's work for each would be most of the time.
    """

    __slots__ = ("_files", "name")

    def __init__(self, files: dict[str, bytes] | None = None, name: str = "") -> None:
        self._files = {} if files is None else files
        self.name = name

    def __truediv__(self, name: str) -> "MemoryPath":
        return MemoryPath(self._files, f"{self.name}/{name}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MemoryPath) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)

    def mkdir(self, *, parents: bool, exist_ok: bool) -> None:
        """Directories need no making."""

    def exists(self) -> bool:
        return self.name in self._files

    def iterdir(self) -> Iterator["MemoryPath"]:
        start = f"{self.name}/"
        return iter([MemoryPath(self._files, name) for name in self._files if name.startswith(start)])

    def replace(self, target: "MemoryPath") -> "MemoryPath":
        self._files[target.name] = self._files.pop(self.name)
        return target

    def unlink(self, *, missing_ok: bool) -> None:
        assert missing_ok
        self._files.pop(self.name, None)

    def read_bytes(self) -> bytes:
        return self._files[self.name]

    def write_bytes(self, data: bytes) -> None:
        self._files[self.name] = data

    def open(self, mode: str, buffering: int = -1) -> io.BytesIO:
        del buffering
        if mode == "rb":
            return io.BytesIO(self._files[self.name])
        assert mode == "wb"
        return _Written(self)


class _Written(io.BytesIO):
    def __init__(self, path: MemoryPath) -> None:
        super().__init__()
        self._path = path

    def close(self) -> None:
        if not self.closed:
            self._path.write_bytes(self.getvalue())
        super().close()

    def __exit__(self, *error: object) -> None:
        self.close()
