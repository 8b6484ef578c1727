"""A hub on localhost that huggingface_hub and datasets use unchanged through ``HF_ENDPOINT``.

    with HubServer(content) as hub:
        os.environ["HF_ENDPOINT"] = hub.url

Two ports: the hub's own, and one for the content of LFS files, because the real hub also redirects
those to another origin. Only this module knows sockets: it reads a request, lets a scheduled fault or a
route answer it, logs, and sends. There is no TLS and no Xet.
"""

import logging
import sys
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self
from urllib.parse import parse_qs, unquote, urlsplit

from metaflow_hf.demo import files, push, routes
from metaflow_hf.demo.content import HubContent
from metaflow_hf.demo.faults import Fault, FaultSchedule
from metaflow_hf.demo.protocol import Answer, Refusal, Request
from metaflow_hf.demo.requestlog import LoggedRequest, RequestLog, Role

_LOGGER = logging.getLogger("metaflow_hf.demo")
_SEND_BYTES = 1 << 18


class HubServer:
    """Serves ``content`` on 127.0.0.1 until closed.

    ``port=0`` takes a free one. ``page_size`` is the number of entries of one page of a tree, search or
    history (the real hub's is 1,000). ``log`` and ``faults`` are for tests. ``start()`` returns once both
    ports accept connections; OSError says that the port is taken.
    """

    def __init__(
        self, content: HubContent, port: int = 0, *, host: str = "127.0.0.1", page_size: int = 1000
    ) -> None:
        self.content = content
        self.page_size = page_size
        self.log = RequestLog()
        self.faults = FaultSchedule()
        self._host = host
        self._hub = _Listener((host, port), self, "hub")
        self._storage = _Listener((host, 0), self, "storage")

    @property
    def url(self) -> str:
        """What belongs into ``HF_ENDPOINT``."""
        return f"http://{self._host}:{self._hub.server_address[1]}"

    @property
    def storage_url(self) -> str:
        return f"http://{self._host}:{self._storage.server_address[1]}"

    def start(self) -> Self:
        for listener in (self._hub, self._storage):
            name = f"metaflow-hf-{listener.role}"
            threading.Thread(target=listener.serve_forever, args=(0.05,), name=name, daemon=True).start()
        return self

    def close(self) -> None:
        """Stop accepting connections; open every gate, so that no request is held for ever."""
        self.faults.clear()
        for listener in (self._hub, self._storage):
            listener.shutdown()
            listener.server_close()

    def abandon(self) -> None:
        """Close the sockets of a server whose threads live in another process (after a fork)."""
        for listener in (self._hub, self._storage):
            listener.socket.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def answer(self, role: Role, request: Request) -> Answer:
        """The answer of one of the two ports to a healthy request."""
        try:
            if role == "hub":
                return routes.answer(self.content, request, self.page_size)
            if request.method == "PUT":
                return push.store_content(self.content, request)
            return files.stored_content(self.content, request)
        except Refusal as refusal:
            return refusal.answer()


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], owner: HubServer, role: Role) -> None:
        self.owner = owner
        self.role: Role = role
        super().__init__(address, _Handler)

    def handle_error(self, _request: object, client_address: object) -> None:
        """The base class would print the exception that is being handled."""
        error = sys.exception()
        went_away = isinstance(error, ConnectionError)  # e.g. a client that was killed
        level = logging.DEBUG if went_away else logging.ERROR
        _LOGGER.log(level, "a request of %s failed", client_address, exc_info=error)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "metaflow-hf-demo"
    disable_nagle_algorithm = True  # headers and body are two writes
    timeout = 60  # seconds that an idle connection is kept
    server: _Listener

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815  the base class looks these up

    def _serve(self) -> None:
        body = self._read_body()
        hub = self.server.owner
        url = urlsplit(self.path)
        fault = hub.faults.take(self.command, unquote(url.path))
        if fault is not None and self._before_answer(fault):
            return
        if fault is not None and fault.kind == "status":
            self._send(Answer(fault.status, b"", fault.headers), fault)
            return
        try:
            answer = hub.answer(self.server.role, self._request(body))
        except Exception as error:  # the client should learn why, whatever it was
            self.close_connection = True
            message = f"{type(error).__name__}: {error}"
            self._send(Answer.of({"error": message}, 500, {"X-Error-Message": message}), None)
            raise
        self._send(answer, fault)

    def _read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", "").lower():
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _before_answer(self, fault: Fault) -> bool:
        """Suffer what comes before the answer; True when there is to be none."""
        if fault.kind == "delay":
            time.sleep(fault.seconds)
        if fault.gate is not None:
            fault.gate.pass_through()
        if fault.kind == "drop":
            self.close_connection = True
            self._log(Answer(0), 0)
            return True
        return False

    def _request(self, body: bytes) -> Request:
        hub = self.server.owner
        url = urlsplit(self.path)
        host = self.headers.get("Host") or urlsplit(hub.url).netloc
        storage_port = urlsplit(hub.storage_url).port
        return Request(
            method=self.command,
            path=url.path,
            query=parse_qs(url.query, keep_blank_values=True),
            headers={k.title(): v for k, v in self.headers.items()},
            body=body,
            url=f"http://{host}",
            storage_url=f"http://{host.rpartition(':')[0] or host}:{storage_port}",
        )

    def _send(self, answer: Answer, fault: Fault | None) -> None:
        body = b"" if self.command == "HEAD" else answer.body
        kind = fault.kind if fault else None
        if kind == "corrupt":
            body = bytes(b ^ 0xFF for b in body)
        if kind == "truncate" and fault is not None:
            body = body[: fault.after_bytes]
            self.close_connection = True
        number = self._log(answer, len(body))
        sent = 0
        try:
            self._send_head(answer.status, answer.headers, len(answer.body))
            step = 1 if kind == "trickle" else _SEND_BYTES
            for start in range(0, len(body), step):
                self.wfile.write(body[start : start + step])
                sent = min(start + step, len(body))
                if kind == "trickle" and fault is not None:
                    time.sleep(fault.seconds)
        except ConnectionError:  # the client went away: it knows best why
            self.close_connection = True
            self.server.owner.log.correct(number, sent)

    def _send_head(self, status: int, headers: Mapping[str, str], length: int) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, "".join(c if c.isprintable() and c.isascii() else "?" for c in value))
        self.send_header("Content-Length", str(length))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    def _log(self, answer: Answer, body_bytes: int) -> int:
        url = urlsplit(self.path)
        entry = LoggedRequest(
            method=self.command,
            path=unquote(url.path),
            query=url.query,
            status=answer.status,
            body_bytes=body_bytes,
            range=self.headers.get("Range"),
            has_token=self.headers.get("Authorization") is not None,
            role=self.server.role,
            is_file=answer.is_file,
        )
        return self.server.owner.log.begin(entry)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base class named it
        _LOGGER.debug(format, *args)
