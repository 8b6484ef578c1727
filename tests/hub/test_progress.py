import io

import pytest

from metaflow_hf.events import DownloadProgress
from metaflow_hf.hub.progress import DownloadBar, DownloadLines, progress_on


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_one_line_per_interval_and_one_at_the_end():
    now, lines = [0.0], []
    tell = DownloadLines(lines.append, interval=10, clock=lambda: now[0])
    for second in range(31):
        now[0] = float(second)
        tell(DownloadProgress(time=0, name="a@1", done_bytes=second * 1_000_000, total_bytes=30_000_000))
    tell(DownloadProgress(time=0, name="a@1", done_bytes=30_000_000, total_bytes=30_000_000))
    assert lines == [
        "Downloading a@1: 33% of 30.0 MB, 1.0 MB/s, eta 20 s",
        "Downloading a@1: 67% of 30.0 MB, 1.0 MB/s, eta 10 s",
        "Downloaded a@1: 30.0 MB in 30.0 s (1.0 MB/s)",
    ]


def test_a_terminal_gets_a_bar_in_bytes_and_a_log_gets_lines(monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", False)
    assert isinstance(progress_on(io.StringIO(), print), DownloadLines)
    terminal = Terminal()
    bar = progress_on(terminal, print)
    assert isinstance(bar, DownloadBar)
    for done in (0, 15_000_000, 30_000_000):
        bar(DownloadProgress(time=0, name="a@1", done_bytes=done, total_bytes=30_000_000))
    last = terminal.getvalue().rpartition("a@1")[2]
    assert last.startswith(": 100%")
    assert "30.0M/30.0M" in last
    assert "B/s" in last
