"""A hub, or what sits before it, that lies: names, checksums, pages, redirects, headers and waits."""

import json
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, Request, build_opener

import pytest

from metaflow_hf.errors import HubUnavailable, IntegrityError, SelectionError
from metaflow_hf.hub.retries import MAX_RETRY_AFTER_SECONDS, wait_before_retry

Answer = tuple[int, dict[str, str], bytes]


class _Stay(HTTPRedirectHandler):
    """Leaves it to the client where to go next."""

    def redirect_request(self, *_: object) -> None:
        return None


class Front(ThreadingHTTPServer):
    """Stands before a hub and passes everything on, unless ``lie`` gives another answer for a path."""

    daemon_threads = True

    def __init__(self, hub: str) -> None:
        super().__init__(("127.0.0.1", 0), _Front)
        self.hub = hub
        self.lie: Callable[[str, Callable[[], Answer]], Answer] = lambda _path, truth: truth()
        self.seen: list[tuple[str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Front(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Front

    def do_GET(self) -> None:
        self.server.seen.append((self.path, self.headers.get("Authorization")))
        status, headers, body = self.server.lie(self.path, self._truth)
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "connection", "date", "server"):
                self.send_header(name, value)
        length = headers.get("Content-Length", str(len(body)))
        self.send_header("Content-Length", length)
        self.end_headers()
        try:
            self.wfile.write(body)
        except ConnectionError:
            self.close_connection = True
        if int(length) != len(body):
            self.close_connection = True

    def _truth(self) -> Answer:
        headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
        try:
            with build_opener(_Stay).open(
                Request(self.server.hub + self.path, headers=headers), timeout=20
            ) as answer:
                return answer.status, dict(answer.headers), answer.read()
        except HTTPError as error:
            return error.code, dict(error.headers), error.read()

    def log_message(self, *_: object) -> None:
        """Silent."""


@pytest.fixture
def fronts() -> Iterator[Callable[[str], Front]]:
    """Starts servers that stand before others."""
    started: list[tuple[Front, threading.Thread]] = []

    def start(hub: str) -> Front:
        server = Front(hub)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        started.append((server, thread))
        return server

    yield start
    for server, thread in started:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def front(own_hub, fronts, monkeypatch: pytest.MonkeyPatch) -> Front:
    """A liar before `own_hub`, which the environment names as the hub."""
    server = fronts(own_hub.url)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    return server


def tree_with(change: dict[str, object]) -> Callable[[str, Callable[[], Answer]], Answer]:
    """The tree's first page, with its first LFS file changed and no page after it."""

    def lie(path: str, truth: Callable[[], Answer]) -> Answer:
        if "/tree/" not in path:
            return truth()
        file = {"type": "file", "path": "weights.bin", "size": 10, "oid": "0" * 40}
        return 200, {"Content-Type": "application/json"}, json.dumps([{**file, **change}]).encode()

    return lie


HOSTILE_NAMES = [
    "/etc/passwd",
    "../up",
    "a/../../up",
    "C:/windows/x",
    "a\\..\\b",
    "nul\0.txt",
    "aux",
    "config.json.",
    "x" * 300,
    "/".join(["deep"] * 400),
]


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=lambda name: repr(name[:12]))
def test_a_hostile_name_is_refused_before_anything_is_written(
    front, snapshots, request_for, store, cache, name: str
):
    front.lie = tree_with({"path": name})
    with pytest.raises(SelectionError, match="is refused because it") as caught:
        snapshots().ensure(request_for())
    assert len(str(caught.value)) < 600
    assert list(store.list("blobs")) == list(store.list("manifests")) == []
    assert list((cache.root / "staging").glob("*/*/*")) == []
    assert not any("/resolve/" in path for path, _ in front.seen)


@pytest.mark.parametrize("names", [["Config.json", "config.json"], ["a", "a/b"], ["é.txt", "e\u0301.txt"]])
def test_names_that_would_overwrite_each_other_are_refused(front, snapshots, request_for, store, names):
    files = [{"type": "file", "path": name, "size": 1, "oid": "0" * 40} for name in names]
    front.lie = lambda path, truth: (200, {}, json.dumps(files).encode()) if "/tree/" in path else truth()
    with pytest.raises(SelectionError, match=r"ignore_patterns|is a file and also"):
        snapshots().ensure(request_for())
    assert list(store.list("manifests")) == []


@pytest.mark.parametrize(
    "change",
    [
        {"oid": "../../../../etc/passwd"},
        {"lfs": {"oid": "../../../../etc/passwd", "size": 10}},
        {"lfs": {"oid": "0" * 40 + "/" * 24, "size": 10}},
        {"size": -1},
        {"size": "many"},
        {"lfs": "no mapping"},
    ],
    ids=str,
)
def test_a_checksum_that_is_a_path_is_refused(front, snapshots, request_for, change):
    front.lie = tree_with(change)
    with pytest.raises(HubUnavailable, match="is not a Hugging Face hub"):
        snapshots().ensure(request_for())


def test_a_listing_that_never_ends_is_noticed(front, snapshots, request_for):
    def again(path: str, truth: Callable[[], Answer]) -> Answer:
        status, headers, body = truth()
        if "/tree/" in path:
            headers["Link"] = f'<{front.url}{path}>; rel="next"'
        return status, headers, body

    front.lie = again
    with pytest.raises(HubUnavailable, match="is not a Hugging Face hub"):
        snapshots().ensure(request_for())


def test_a_page_on_another_host_is_read_without_the_token(front, fronts, own_hub, snapshots, request_for):
    other = fronts(own_hub.url)

    def elsewhere(path: str, truth: Callable[[], Answer]) -> Answer:
        status, headers, body = truth()
        if "Link" in headers:
            headers["Link"] = headers["Link"].replace(own_hub.url, other.url).replace(front.url, other.url)
        return status, headers, body

    front.lie = elsewhere
    assert snapshots().ensure(request_for(token="hf_friend")).num_files == 7
    assert any("/tree/" in path for path, _ in other.seen)
    assert {token for _, token in other.seen} == {None}
    assert "Bearer hf_friend" in {token for _, token in front.seen}


@pytest.mark.parametrize("what", ["/api/", "/resolve/"])
def test_a_redirect_to_another_host_takes_no_token_along(
    front, fronts, own_hub, snapshots, request_for, what: str
):
    other = fronts(own_hub.url)
    front.lie = lambda path, truth: (307, {"Location": other.url + path}, b"") if what in path else truth()
    assert snapshots().ensure(request_for(token="hf_friend")).num_files == 7
    assert any(what in path for path, _ in other.seen)
    assert {token for _, token in other.seen} == {None}
    # Nor does the host that keeps the large files.
    assert not any(entry.has_token for entry in own_hub.log if entry.role == "storage")


def test_a_body_longer_than_announced_in_the_tree_is_refused(front, snapshots, request_for, store, cache):
    endless = 32 << 20

    def more(path: str, truth: Callable[[], Answer]) -> Answer:
        return (200, {}, b"x" * endless) if path.endswith("/config.json") else truth()

    front.lie = more
    with pytest.raises(IntegrityError, match=r"config\.json"):
        snapshots().ensure(request_for())
    assert list(store.list("manifests")) == []
    staged = [path.stat().st_size for path in (cache.root / "staging").rglob("*") if path.is_file()]
    assert sum(staged) < endless


def test_a_body_that_is_cut_and_says_so_is_no_complete_file(
    front, snapshots, request_for, store, files, read_tree, tmp_path: Path
):
    """A proxy that caches a part of a file announces the part's length, and forgets about ranges."""
    cut: list[str] = []

    def part(path: str, truth: Callable[[], Answer]) -> Answer:
        if path.endswith("/config.json") and len(cut) < 2:
            cut.append(path)
            return 200, {}, files["config.json"][:5]
        return truth()

    front.lie = part
    reference = snapshots().ensure(request_for())
    assert len(cut) == 2
    assert read_tree(snapshots().load(reference, tmp_path / "out")) == files


def test_a_file_shorter_than_what_came_before_is_begun_anew(
    front, snapshots, request_for, cache, files, read_tree, tmp_path: Path
):
    """A download was cut behind a hub that counted wrongly: its rest is past the end."""
    refused: list[str] = []

    def past_the_end(path: str, truth: Callable[[], Answer]) -> Answer:
        if path.endswith("/config.json") and not refused:
            refused.append(path)
            return 416, {}, b""
        return truth()

    front.lie = past_the_end
    reference = snapshots().ensure(request_for())
    assert refused
    assert read_tree(snapshots().load(reference, tmp_path / "out")) == files


@pytest.mark.parametrize("token", ["hf_secret\nX: y", "hf_sécret", "hf_se\tcret"])
def test_a_token_that_no_header_can_carry_is_refused_unseen(own_hub, snapshots, request_for, caplog, token):
    with pytest.raises(SelectionError, match="'authorization'") as caught:
        snapshots().ensure(request_for(token=token))
    assert "cret" not in str(caught.value) + caplog.text
    assert len(own_hub.log) == 0


def test_a_token_read_with_its_line_break_works(own_hub, snapshots, request_for):
    assert snapshots().ensure(request_for("acme/gated", token="hf_friend\n")).num_files == 2


def test_token_true_without_a_token_is_said(own_hub, snapshots, request_for):
    with pytest.raises(SelectionError, match="HF_TOKEN"):
        snapshots().ensure(request_for(token=True))


class _Busy(Exception):
    """An answer, as huggingface_hub raises it."""

    def __init__(self, status: int, after: str | None) -> None:
        headers = {} if after is None else {"Retry-After": after}
        self.response = type("Response", (), {"status_code": status, "headers": headers})()


@pytest.mark.parametrize(
    ("after", "least", "most"),
    [
        ("7", 7, 7),
        (" 7 ", 7, 7),
        ("0", 0, 0),
        ("86400", MAX_RETRY_AFTER_SECONDS, MAX_RETRY_AFTER_SECONDS),
    ],
)
def test_how_long_a_busy_hub_asks_to_wait(after: str, least: float, most: float):
    for status in (429, 503):
        assert least <= wait_before_retry(_Busy(status, after)) <= most


@pytest.mark.parametrize(("days", "seconds"), [(1, MAX_RETRY_AFTER_SECONDS), (-1, 0)])
def test_a_busy_hub_names_a_date(days: int, seconds: float):
    after = format_datetime(datetime.now(UTC) + timedelta(days=days), usegmt=True)
    assert wait_before_retry(_Busy(429, after)) == seconds


@pytest.mark.parametrize("after", [None, "", "soon", "²", "-5", "1e9", "Wed, 99 Foo 2015 07:28:00 GMT"])
def test_a_wait_that_cannot_be_read_is_our_own(after: str | None):
    assert wait_before_retry(_Busy(429, after)) is True
