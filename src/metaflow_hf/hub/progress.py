"""How far downloads are: a bar on a terminal; in a log one line per interval, and one at the end."""

import threading
import time
from collections.abc import Callable
from typing import Any, Final, Self, TextIO

from metaflow_hf.events import DownloadProgress, Event

INTERVAL_SECONDS: Final = 10.0


class DownloadLines:
    """An ``OnEvent`` that says how far downloads are. Thread-safe.

    ``say`` gets one line per ``interval`` seconds and download, and one when all bytes are there: how many came over the
    network, how fast, how many needed none.
    """

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
        self._lock = threading.Lock()
        self._began: dict[str, float] = {}
        self._told: dict[str, float] = {}
        self._finished: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        pass

    def __call__(self, event: Event) -> None:
        if not isinstance(event, DownloadProgress):
            return
        with self._lock:
            now = self._clock()
            is_done = event.done_bytes >= event.total_bytes
            if event.name in self._finished:
                if is_done:
                    return
                # The same once more, by force_download.
                self._finished.remove(event.name)
                del self._began[event.name], self._told[event.name]
            began = self._began.setdefault(event.name, now)
            if not is_done and now - self._told.setdefault(event.name, now) < self._interval:
                return
            self._told[event.name] = now
            if is_done:
                self._finished.add(event.name)
        self._say(_line(event, now - began))


class DownloadBar:
    """An ``OnEvent`` that draws one bar in bytes per download, with rate and time left, and ends it with the line that a
    log would get. Thread-safe.

    huggingface_hub's switch for its bars (``HF_HUB_DISABLE_PROGRESS_BARS``) counts for these too. As a context manager
    it ends, on a line of their own, the bars of downloads that failed.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._bars: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        with self._lock:
            for bar in self._bars.values():
                bar.close()

    def __call__(self, event: Event) -> None:
        if not isinstance(event, DownloadProgress):
            return
        with self._lock:
            bar = self._bars.get(event.name)
            if bar is None:
                bar = self._bars[event.name] = byte_bar(event.name, event.total_bytes, self._file)
            if bar.disable:
                return
            # The rate is one of the network.
            bar.initial = event.cached_bytes
            bar.set_postfix_str(", ".join(_besides(event)), refresh=False)
            bar.update(event.done_bytes - bar.n)
            if event.done_bytes >= event.total_bytes:
                seconds = bar.format_dict["elapsed"]
                bar.leave = False
                bar.close()
                bar.disable = True
                # Above the bars that are still drawn.
                bar.write(_line(event, seconds), file=self._file)


def progress_on(file: TextIO, say: Callable[[str], None]) -> DownloadBar | DownloadLines:
    """A bar where a person watches the terminal, lines where a log is written."""
    return DownloadBar(file) if file.isatty() else DownloadLines(say)


def byte_bar(name: str, total_bytes: int | None, file: TextIO) -> Any:
    """A bar of tqdm's that counts bytes; ``None`` where the total is not known."""
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    return tqdm(total=total_bytes, unit="B", unit_scale=True, desc=name, file=file, leave=True)  # type: ignore[no-untyped-call]


def _line(event: DownloadProgress, seconds: float) -> str:
    brought = event.done_bytes - event.cached_bytes
    rate = brought / seconds if seconds > 0 else 0.0
    if event.done_bytes >= event.total_bytes and not brought:
        return f"{event.name}: {format_bytes(event.total_bytes)}, all from the cache"
    if event.done_bytes >= event.total_bytes:
        facts = [
            f"Downloaded {event.name}: {format_bytes(brought)} in {seconds:.1f} s ({format_bytes(rate)}/s)"
        ]
    else:
        left = (event.total_bytes - event.done_bytes) / rate if rate > 0 else float("inf")
        share = f"{event.done_bytes / event.total_bytes:.0%} of {format_bytes(event.total_bytes)}"
        facts = [f"Downloading {event.name}: {share}", f"{format_bytes(rate)}/s", f"eta {duration(left)}"]
    return ", ".join([*facts, *_besides(event)])


def _besides(event: DownloadProgress) -> list[str]:
    facts = []
    if event.cached_bytes:
        facts.append(f"{format_bytes(event.cached_bytes)} from the cache")
    if event.retries:
        facts.append("1 retry" if event.retries == 1 else f"{event.retries} retries")
    return facts


def format_bytes(count: float) -> str:
    """``1.5 GB``: decimal units, as the hub shows them."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float) -> str:
    """``12 min 5 s``: how long something takes."""
    if seconds == float("inf"):
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
