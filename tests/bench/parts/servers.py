"""Servers in a process of their own, so that they do not share the interpreter of those who are measured.

python servers.py hub MEGABYTES SHARDS      a hub with one repository (branches main and v2: another last shard)
python servers.py s3 DIRECTORY              buckets as directories: GET and HEAD with ranges, PUT, uploads in parts

The first line of the output is the address; the server ends with its input.
"""

import os
import re
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

REPO = "bench/sharded"
TINY_REPO = "bench/tiny"


@contextmanager
def running(*arguments: object) -> Iterator[str]:
    """The address of a server that runs for the length of the block."""
    process = subprocess.Popen(
        [sys.executable, __file__, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process.stdout.readline().strip()
    finally:
        process.stdin.close()
        process.wait()


def _serve_hub(megabytes: int, shards: int) -> None:
    from metaflow_hf.demo.content import HubContent
    from metaflow_hf.demo.server import HubServer

    size = (megabytes << 20) // shards
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    content = HubContent()
    config = b'{"model_type": "bench"}'
    repo = content.add(REPO, {"config.json": config, **{name: os.urandom(size) for name in names}})
    repo.commit({names[-1]: os.urandom(size)}, branch="v2")
    content.add(TINY_REPO, {"config.json": config, "model.safetensors": os.urandom(1 << 16)})
    with HubServer(content) as server:
        print(server.url, flush=True)
        sys.stdin.read()


class _S3Handler(BaseHTTPRequestHandler):
    """As much of S3 as boto3 and obstore ask for to list, read and write objects; nothing is authenticated."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    root: ClassVar[Path]
    uploads: ClassVar[dict[str, dict[int, Path]]] = {}
    # Seconds before each answer, as a store has that is not on this machine.
    latency: ClassVar[float] = 0.0

    def do_GET(self) -> None:
        place, query = self._place()
        if "list-type" in query:
            self._list(place, query)
        else:
            self._send_file(place)

    def do_HEAD(self) -> None:
        self._send_file(self._place()[0])

    def do_PUT(self) -> None:
        place, query = self._place()
        self._pause()
        if "partNumber" in query:
            upload = query["uploadId"][0]
            part = self.root / f".{upload}-{query['partNumber'][0]}"
            self._receive(part)
            self.uploads[upload][int(query["partNumber"][0])] = part
        elif self.headers.get("If-None-Match") == "*" and place.exists():
            self._receive(None)
            self._answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
            return
        else:
            new = self.root / f".{uuid.uuid4().hex}"
            self._receive(new)
            place.parent.mkdir(parents=True, exist_ok=True)
            new.replace(place)
        self._answer(200, b"", {"ETag": '"bench"'})

    def do_POST(self) -> None:
        place, query = self._place()
        self._receive(None)
        self._pause()
        if "uploads" in query:
            upload = uuid.uuid4().hex
            self.uploads[upload] = {}
            name = f"<UploadId>{upload}</UploadId>"
            self._answer(
                200, f"<InitiateMultipartUploadResult>{name}</InitiateMultipartUploadResult>".encode()
            )
            return
        parts = self.uploads.pop(query["uploadId"][0])
        place.parent.mkdir(parents=True, exist_ok=True)
        with place.open("wb") as out:
            for number in sorted(parts):
                with parts[number].open("rb") as part:
                    while os.sendfile(out.fileno(), part.fileno(), None, 1 << 30):
                        pass
                parts[number].unlink()
        body = "<ETag>bench</ETag><Bucket>b</Bucket><Key>k</Key><Location>l</Location>"
        self._answer(200, f"<CompleteMultipartUploadResult>{body}</CompleteMultipartUploadResult>".encode())

    def do_DELETE(self) -> None:
        self._place()[0].unlink(missing_ok=True)
        self._answer(204, b"")

    def _place(self) -> tuple[Path, dict[str, list[str]]]:
        url = urlsplit(self.path)
        return self.root / unquote(url.path).strip("/"), parse_qs(url.query, keep_blank_values=True)

    def _pause(self) -> None:
        if self.latency:
            time.sleep(self.latency)

    def _receive(self, place: Path | None) -> None:
        left = int(self.headers.get("Content-Length") or 0)
        if "100-continue" in self.headers.get("Expect", ""):
            self.send_response_only(100)
            self.end_headers()
        with open(place or os.devnull, "wb") as out:
            while left:
                data = self.rfile.read(min(left, 1 << 20))
                left -= len(data)
                out.write(data)

    def _send_file(self, place: Path) -> None:
        self._pause()
        if not place.is_file():
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
            return
        size = place.stat().st_size
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, stop = 0, size
        if match:
            start, stop = int(match[1]), min(int(match[2] or size) + 1, size)
        self.send_response(206 if match else 200)
        self.send_header("Content-Length", str(stop - start))
        self.send_header("ETag", '"bench"')
        self.send_header("Last-Modified", self.date_time_string(place.stat().st_mtime))
        if match:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.end_headers()
        self.wfile.flush()
        if self.command == "GET":
            with place.open("rb") as file:
                while start < stop:
                    start += os.sendfile(self.connection.fileno(), file.fileno(), start, stop - start)

    def _list(self, bucket: Path, query: dict[str, list[str]]) -> None:
        self._pause()
        prefix, delimiter = query.get("prefix", [""])[0], query.get("delimiter", [""])[0]
        keys, folders = [], set()
        for path in sorted(bucket.rglob("*")):
            key = path.relative_to(bucket).as_posix()
            if not path.is_file() or not key.startswith(prefix) or key <= query.get("start-after", [""])[0]:
                continue
            head, mark, _ = key[len(prefix) :].partition(delimiter or "\0")
            if mark:
                folders.add(f"{prefix}{head}{mark}")
            else:
                keys.append((key, path.stat()))
        body = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{info.st_size}</Size><ETag>bench</ETag>"
            f"<LastModified>{time.strftime('%Y-%m-%dT%H:%M:%S.000Z', time.gmtime(info.st_mtime))}</LastModified>"
            "</Contents>"
            for key, info in keys
        )
        body += "".join(
            f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in sorted(folders)
        )
        self._answer(
            200, f"<ListBucketResult><IsTruncated>false</IsTruncated>{body}</ListBucketResult>".encode()
        )

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


class _S3Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


def _serve_s3(directory: str, latency: str = "0") -> None:
    _S3Handler.root = Path(directory)
    _S3Handler.latency = float(latency)
    server = _S3Server(("127.0.0.1", 0), _S3Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    if sys.argv[1] == "hub":
        _serve_hub(int(sys.argv[2]), int(sys.argv[3]))
    else:
        _serve_s3(*sys.argv[2:])
