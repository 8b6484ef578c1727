"""An answer that gets lost on the way does not make a winner think that it lost, nor two win."""

import http.client
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
from s3_server import S3Server

from metaflow_hf.store import open_store


class _Proxy(ThreadingHTTPServer):
    """Forwards to an S3 server; carries out, but does not answer, as many PUT requests as it is told to."""

    daemon_threads = True

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = urlsplit(target)
        self.drop = 0
        self.puts = 0


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Proxy

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        upstream = http.client.HTTPConnection(
            self.server.target.hostname, self.server.target.port, timeout=20
        )
        headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
        upstream.request(self.command, self.path, body=body or None, headers=headers)
        answer = upstream.getresponse()
        content = answer.read()
        upstream.close()
        if self.command == "PUT":
            self.server.puts += 1
            if self.server.drop:
                self.server.drop -= 1
                self.close_connection = True
                self.connection.close()
                return
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length", "date", "server"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_HEAD = do_DELETE = _forward

    def log_message(self, *args) -> None:
        """Silent."""


@pytest.fixture
def proxy(s3_server: S3Server, s3_root: str, monkeypatch: pytest.MonkeyPatch):
    from metaflow import metaflow_config

    server = _Proxy(s3_server.url)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(metaflow_config, "S3_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("lost", [1, 2])
def test_a_winner_whose_answer_was_lost_has_won(proxy: _Proxy, s3_root: str, lost: int):
    store = open_store(s3_root)
    proxy.drop = lost
    outcome = store.create("claims/1", b"mine, with my nonce")
    assert outcome.created
    assert proxy.drop == 0
    assert proxy.puts > lost  # it was asked again
    assert store.get("claims/1") == b"mine, with my nonce"


def test_a_loser_whose_answer_was_lost_has_lost(proxy: _Proxy, s3_root: str):
    store = open_store(s3_root)
    assert store.create("claims/1", b"theirs").created
    proxy.drop = 1
    outcome = store.create("claims/1", b"mine")
    assert (outcome.created, outcome.content) == (False, b"theirs")
