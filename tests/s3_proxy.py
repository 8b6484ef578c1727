"""Between a client and an S3 server: answers get lost, come as SlowDown, or are refused for want of a permission."""

import http.client
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from serving import serving

_ERROR = "<Error><Code>{code}</Code><Message>as the test wants it</Message></Error>"

_CODES = {409: "ConditionalRequestConflict", 503: "SlowDown"}


class S3Proxy(ThreadingHTTPServer):
    """Forwards to an S3 server. Set what it does to the next requests:

    ``drop`` carries out, but does not answer, so many PUT requests; ``slow_down`` answers so many requests with 503;
    ``conflicts`` refuses so many PUT requests with 409, as S3 does while another one creates the key; ``may_list`` refuses listings of any other prefix, and tells 403 of objects that are missing, as S3 does to those who may
    not list the whole bucket; ``lists_lag`` answers each listing as it was first answered. ``who`` are the access keys and session tokens that came.
    """

    daemon_threads = True

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = urlsplit(target)
        self.drop = self.slow_down = self.conflicts = 0
        self.may_list: str | None = None
        self.lists_lag = False
        self.first_lists: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.who: set[tuple[str, str | None]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def count(self, method: str, words: str = "") -> int:
        return sum(asked == method and words in path for asked, path in self.requests)

    def refused(self, method: str, path: str) -> int | None:
        """The status with which a request is not even forwarded."""
        if self.slow_down:
            self.slow_down -= 1
            return 503
        if self.conflicts and method == "PUT":
            self.conflicts -= 1
            return 409
        query = parse_qs(urlsplit(path).query)
        if self.may_list is not None and method == "GET" and "list-type" in query:
            return None if query.get("prefix", [""])[0].startswith(self.may_list) else 403
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: S3Proxy

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append((self.command, self.path))
        key = re.search(r"Credential=([^/]+)/", self.headers.get("Authorization", ""))
        if key:
            self.server.who.add((key[1], self.headers.get("X-Amz-Security-Token")))
        if status := self.server.refused(self.command, self.path):
            self._answer(status, [], _ERROR.format(code=_CODES.get(status, "AccessDenied")).encode())
            return
        host = self.server.target
        headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
        with closing(http.client.HTTPConnection(host.hostname or "", host.port, timeout=20)) as upstream:
            upstream.request(self.command, self.path, body=body or None, headers=headers)
            answer = upstream.getresponse()
            content, status = answer.read(), answer.status
        if self.command == "PUT" and self.server.drop:
            self.server.drop -= 1
            self.close_connection = True
            self.connection.close()
            return
        if self.command == "GET" and "list-type=2" in self.path and status == 200:
            first = self.server.first_lists.setdefault(self.path, content)
            content = first if self.server.lists_lag else content
        if self.server.may_list is not None and status == 404 and self.command in ("GET", "HEAD"):
            status, content = 403, _ERROR.format(code="AccessDenied").encode()
        self._answer(status, answer.getheaders(), content)

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
        self.send_response(status)
        sizes = [value for name, value in headers if name.lower() == "content-length"]
        for name, value in headers:
            if name.lower() not in ("transfer-encoding", "connection", "content-length", "date", "server"):
                self.send_header(name, value)
        is_head = self.command == "HEAD"
        self.send_header(
            "Content-Length", sizes[0] if is_head and sizes and status == 200 else str(len(content))
        )
        self.end_headers()
        if not is_head:
            self.wfile.write(content)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _forward

    def log_message(self, *args) -> None:
        """Silent."""


@contextmanager
def running_proxy(target: str) -> Iterator[S3Proxy]:
    """A proxy that lives as long as the context."""
    with serving(S3Proxy(target)) as server:
        yield server
