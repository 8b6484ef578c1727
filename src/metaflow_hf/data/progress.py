"""How far a build is: bytes of the source read, rows and blocks committed, and how long the rest will take."""

import dataclasses
import io
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, Final, TextIO, cast

from metaflow_hf.data.manifest import BlockManifest, Cursor
from metaflow_hf.data.sources import Source
from metaflow_hf.data.sources.files import FileSource, SourceFile
from metaflow_hf.data.sources.views import FileView
from metaflow_hf.hub.progress import byte_bar, duration, format_bytes

INTERVAL_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildState:
    """What is known at one moment; ``total_bytes`` of the source are 0 where nobody knows."""

    name: str
    rows: int
    blocks: int
    stored_bytes: int
    read_bytes: int
    total_bytes: int
    bytes_per_second: float
    is_complete: bool

    @property
    def eta_seconds(self) -> float | None:
        """How long the rest will take at the speed so far; ``None`` where that cannot be told."""
        if not self.total_bytes or not self.bytes_per_second:
            return None
        return (self.total_bytes - self.read_bytes) / self.bytes_per_second

    def line(self) -> str:
        done = (
            f"{self.name}: {self.rows:,} rows, {format_bytes(self.stored_bytes)} in {self.blocks} "
            f"block{'' if self.blocks == 1 else 's'}"
        )
        if self.is_complete:
            return f"{done}, complete"
        if not self.total_bytes:
            return done
        eta = self.eta_seconds
        return (
            f"{done}; read {self.read_bytes / self.total_bytes:.0%} of {format_bytes(self.total_bytes)}, "
            f"{format_bytes(self.bytes_per_second)}/s, eta {'unknown' if eta is None else duration(eta)}"
        )


class BuildProgress:
    """Counts what a build reads and commits and shows it to ``show``. Thread-safe.

    ``meter`` gives a source that counts what is read of it; ``committed`` is a build's ``progress``, ``shard_committed``
    that of a build by shards. ``name`` is what is built, ``total_bytes`` the size of what will be metered.
    """

    def __init__(
        self,
        name: str,
        show: Callable[[BuildState], None],
        *,
        total_bytes: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._show = show
        self._total = total_bytes
        self._clock = clock
        self._began = clock()
        self._lock = threading.Lock()
        self._parts: dict[int, tuple[int, int, int]] = {}
        self._skipped = 0
        self._read = 0

    def meter(self, source: Source) -> Source:
        """The same source; what is read of its files counts. One that is no list of files is not metered."""
        if not isinstance(source, FileSource):
            return source
        return _MeteredSource(
            **{field.name: getattr(source, field.name) for field in dataclasses.fields(FileSource)},
            progress=self,
        )

    def committed(self, manifest: BlockManifest) -> None:
        """What is committed of the whole dataset now."""
        self.shard_committed(0, manifest)

    def shard_committed(self, shard: int, manifest: BlockManifest) -> None:
        """What is committed of one shard now."""
        with self._lock:
            size = sum(block.size_bytes for block in manifest.blocks)
            self._parts[shard] = (manifest.total_samples, manifest.total_blocks, size)
        self._show(self.state())

    def skip(self, num_bytes: int) -> None:
        """So many bytes of the source were dealt with before: they count as read, but not for the speed."""
        with self._lock:
            self._skipped += num_bytes

    def read(self, num_bytes: int) -> None:
        """So many bytes of the source were read."""
        with self._lock:
            self._read += num_bytes
        self._show(self.state())

    def state(self) -> BuildState:
        """What is known now."""
        with self._lock:
            rows, blocks, stored = (
                map(sum, zip(*self._parts.values(), strict=True)) if self._parts else (0, 0, 0)
            )
            read = min(self._skipped + self._read, self._total) if self._total else self._read
            seconds = self._clock() - self._began
            return BuildState(
                name=self._name,
                rows=rows,
                blocks=blocks,
                stored_bytes=stored,
                read_bytes=read,
                total_bytes=self._total,
                bytes_per_second=self._read / seconds if seconds > 0 else 0.0,
                is_complete=False,
            )

    def complete(self) -> BuildState:
        """The last word: everything is there."""
        state = dataclasses.replace(self.state(), is_complete=True, read_bytes=self._total)
        self._show(state)
        return state


class BuildLines:
    """Says a line per ``interval`` seconds, and one at the end: for logs."""

    def __init__(
        self,
        say: Callable[[str], None],
        *,
        interval: float = INTERVAL_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._say = say
        self._interval = interval
        self._clock = clock
        self._told = clock()

    def __call__(self, state: BuildState) -> None:
        now = self._clock()
        if state.is_complete or now - self._told >= self._interval:
            self._told = now
            self._say(state.line())


class BuildBar:
    """Draws a bar in bytes of the source, with rows beside it: for people at a terminal."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._bar: Any = None

    def __call__(self, state: BuildState) -> None:
        if self._bar is None:
            self._bar = byte_bar(state.name, state.total_bytes or None, self._file)
        self._bar.set_postfix_str(f"{state.rows:,} rows in {state.blocks} blocks", refresh=False)
        self._bar.update(state.read_bytes - self._bar.n)
        if state.is_complete:
            self._bar.close()


def show_on(file: TextIO, say: Callable[[str], None]) -> Callable[[BuildState], None]:
    """A bar where a person watches the terminal, lines where a log is written."""
    return BuildBar(file) if file.isatty() else BuildLines(say)


def source_bytes(source: Source) -> int:
    """The size of a source as it is stored; 0 where nobody knows."""
    return sum(file.size for file in source.files) if isinstance(source, FileSource) else 0


@dataclass(frozen=True, kw_only=True)
class _MeteredSource(FileSource):
    progress: BuildProgress

    def batches(self, cursor: Cursor) -> Any:
        self.progress.skip(sum(file.size for file in self.files[: cursor.file]) + cursor.offset)
        metered = dataclasses.replace(self, files=[_metered(file, self.progress) for file in self.files])
        return FileSource.batches(metered, cursor)


def _metered(file: SourceFile, progress: BuildProgress) -> SourceFile:
    if isinstance(file, FileView):
        return dataclasses.replace(file, file=_MeteredFile(file.file, progress))
    return _MeteredFile(file, progress)


@dataclass(frozen=True, slots=True)
class _MeteredFile:
    inner: SourceFile
    progress: BuildProgress

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def size(self) -> int:
        return self.inner.size

    def open(self) -> BinaryIO:
        return cast("BinaryIO", _MeteredStream(self.inner.open(), self.progress))


class _MeteredStream(io.RawIOBase):
    """Passes a file on and counts what is read of it."""

    def __init__(self, inner: BinaryIO, progress: BuildProgress) -> None:
        self._inner = inner
        self._progress = progress

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._inner.read(len(buffer))
        buffer[: len(data)] = data
        self._progress.read(len(data))
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._inner.seek(offset, whence)

    def tell(self) -> int:
        return self._inner.tell()

    def close(self) -> None:
        self._inner.close()
        super().close()
