"""How far downloads are, for people at a terminal, for logs, and for whoever listens."""

import io
import logging
import os
import re
from pathlib import Path

import pytest

from metaflow_hf.events import DownloadProgress
from metaflow_hf.hub import download_large_model, hf_hub_download, production_download, snapshot_download
from metaflow_hf.hub.progress import DownloadBar, DownloadLines, progress_on
from metaflow_hf.hub.tally import Tally
from metaflow_hf.hub.transfer import silent_bar
from metaflow_hf.store import datastore


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
    for done in (0, 15_000_000, 30_000_000, 30_000_000):
        bar(DownloadProgress(time=0, name="a@1", done_bytes=done, total_bytes=30_000_000))
    drawn = terminal.getvalue()
    assert "0.00/30.0M" in drawn
    assert "B/s" in drawn
    # It ends in words, once, on a line that is kept.
    assert re.fullmatch(r"Downloaded a@1: 30\.0 MB in .* s \(.*/s\)\n", drawn.rpartition("\r")[2])
    bar(DownloadProgress(time=0, name="b@1", done_bytes=7, total_bytes=7, cached_bytes=7))
    assert terminal.getvalue().endswith("b@1: 7 B, all from the cache\n")
    assert terminal.getvalue().count("\n") == 2


def test_lines_tell_what_came_from_the_cache_and_how_often_was_retried():
    now, lines = [0.0], []
    tell = DownloadLines(lines.append, interval=10, clock=lambda: now[0])
    for second, done, retries in ((0, 20, 0), (10, 30, 1), (20, 40, 2)):
        now[0] = float(second)
        tell(
            DownloadProgress(
                time=0,
                name="a@1",
                done_bytes=done * 1_000_000,
                total_bytes=40_000_000,
                cached_bytes=20_000_000,
                retries=retries,
            )
        )
    tell(DownloadProgress(time=0, name="b@1", done_bytes=7, total_bytes=7, cached_bytes=7))
    assert lines == [
        "Downloading a@1: 75% of 40.0 MB, 1.0 MB/s, eta 10 s, 20.0 MB from the cache, 1 retry",
        "Downloaded a@1: 20.0 MB in 20.0 s (1.0 MB/s), 20.0 MB from the cache, 2 retries",
        "b@1: 7 B, all from the cache",
    ]


def test_the_bar_of_a_failed_download_ends_its_line(monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", False)
    terminal = Terminal()
    with pytest.raises(OSError, match="gone"), progress_on(terminal, print) as bar:
        bar(
            DownloadProgress(
                time=0, name="a@1", done_bytes=5, total_bytes=30_000_000, cached_bytes=5, retries=3
            )
        )
        raise OSError("gone")
    assert terminal.getvalue().endswith("\n")
    assert "5 B from the cache, 3 retries" in terminal.getvalue()


def test_xet_bars_tell_the_bytes_of_the_file():
    """Through what huggingface_hub reports Xet downloads with, which has bars for two kinds of bytes."""
    from types import SimpleNamespace

    from huggingface_hub.utils._xet_progress_reporting import XetDownloadProgressReporter

    events: list[DownloadProgress] = []
    tally = Tally("a@1", 100, events.append)
    with XetDownloadProgressReporter(
        reconstruction_desc="x", log_level=20, total=100, tqdm_class=silent_bar(tally.file("x"))
    ) as reporter:
        for done, transferred in ((0, 10), (40, 30), (100, 60)):
            reporter.update_progress(
                SimpleNamespace(
                    total_bytes_completed=done,
                    total_transfer_bytes_completed=transferred,
                    total_bytes_completion_rate=1.0,
                    total_transfer_bytes_completion_rate=1.0,
                    total_bytes=100,
                )
            )
    assert [event.done_bytes for event in events] == [40, 100]


@pytest.fixture
def lines(own_hub, tmp_path: Path, monkeypatch, caplog):
    """What a script with logging sees of downloads into a datastore of its own."""
    monkeypatch.setenv("METAFLOW_HF_CACHE", str(tmp_path / "node"))
    monkeypatch.setattr(datastore, "_active", ("local", str(tmp_path / ".metaflow")))
    caplog.set_level(logging.INFO, logger="metaflow_hf.hub")

    def take() -> list[str]:
        found = [line for line in caplog.messages if re.match(r"Download(ed|ing) |.* from the cache$", line)]
        caplog.clear()
        return [re.sub(r"@[0-9a-f]{12}|in [\d.]+ s \(.*?/s\)", "", line) for line in found]

    return take


def test_plain_downloads_say_what_they_brought(own_hub, lines, files):
    hf_hub_download("acme/model", "model-00001-of-00004.safetensors")
    assert lines() == ["Downloaded acme/model: 300.0 kB "]
    snapshot_download("acme/model")
    assert lines() == ["Downloaded acme/model: 900.0 kB , 300.0 kB from the cache"]
    snapshot_download("acme/model")
    assert lines() == ["acme/model: 1.2 MB, all from the cache"]
    own_hub.content.add("acme/copy", {name: data for name, data in files.items() if "model-" in name})
    snapshot_download("acme/copy")
    assert lines() == ["acme/copy: 1.2 MB, all from the cache"]


def test_retries_are_counted_and_what_came_before_is_not_counted_again(own_hub, lines):
    own_hub.faults.truncate_next(1, path="/lfs/*", after_bytes=100_000)
    snapshot_download("acme/model", allow_patterns="*00001-of*")
    [line] = lines()
    assert line == "Downloaded acme/model: 300.0 kB , 1 retry"


def test_a_pre_filled_cache_is_no_network(own_hub, lines):
    import huggingface_hub

    cache = os.environ["HF_HUB_CACHE"]
    huggingface_hub.hf_hub_download(
        "acme/model", "model-00001-of-00004.safetensors", endpoint=own_hub.url, cache_dir=cache
    )
    snapshot_download("acme/model", allow_patterns=["*00001-of*", "*00002-of*"])
    assert lines() == ["Downloaded acme/model: 300.0 kB , 300.0 kB from the cache"]


def test_a_large_model_is_one_download(lines):
    download_large_model("acme/model")
    assert lines() == ["Downloaded acme/model: 1.2 MB "]


def test_a_published_model_is_told_too(lines, tmp_path: Path):
    production_download("acme/model", tmp_path / "v1")
    assert lines() == ["Downloaded acme/model: 1.2 MB "]


def test_a_person_at_a_terminal_sees_one_bar(own_hub, lines, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", False)
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    download_large_model("acme/model")
    drawn = terminal.getvalue()
    assert len(set(re.findall(r"acme/model@[0-9a-f]{12}", drawn))) == 1
    assert "/1.20M" in drawn
    assert re.search(r"\rDownloaded acme/model@\w+: 1\.2 MB in .*\n$", drawn)
    assert drawn.count("\n") == 1
    assert lines() == []
