"""Google Cloud Storage on localhost: the store is fake-gcs-server's, which knows Google's JSON protocol; clients speak the
XML one, so this translates. Conditions, listings and errors are the server's; uploads in parts are put together here.

https://cloud.google.com/storage/docs/xml-api/overview
"""

import itertools
import json
import re
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit
from xml.sax.saxutils import escape

from serving import serving


class GcsFront(ThreadingHTTPServer):
    """Translates for the server at ``target``; ``uploads`` has the parts of those that are not complete."""

    daemon_threads = True

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = target
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.names = itertools.count()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def ask(
        self, method: str, path: str, body: bytes | None = None, content_type: str = "application/json"
    ) -> tuple[int, bytes]:
        """Status and content of the server's answer."""
        request = urllib.request.Request(f"{self.target}{path}", data=body, method=method)
        request.add_header("Content-Type", content_type)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: GcsFront

    def _parsed(self) -> tuple[str, str, dict[str, str]]:
        parts = urlsplit(self.path)
        bucket, _, key = unquote(parts.path).removeprefix("/").partition("/")
        query = parse_qs(parts.query, keep_blank_values=True)
        return bucket, key, {name: values[0] for name, values in query.items()}

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_PUT(self) -> None:
        bucket, key, query = self._parsed()
        content = self._body()
        if "uploadId" in query:
            parts = self.server.uploads[query["uploadId"]]
            parts[int(query["partNumber"])] = content
            self._say(200, b"", {"ETag": f'"{query["partNumber"]}"'})
            return
        self._insert(bucket, key, content)

    def do_POST(self) -> None:
        bucket, key, query = self._parsed()
        told = self._body().decode()
        if "uploads" in query:
            upload = str(next(self.server.names))
            self.server.uploads[upload] = {}
            self._say(200, _xml("InitiateMultipartUploadResult", UploadId=upload))
            return
        parts = self.server.uploads.pop(query["uploadId"])
        listed = [int(number) for number in re.findall(r"<PartNumber>(\d+)</PartNumber>", told)]
        assert sorted(parts) == listed, (sorted(parts), listed)
        self._insert(bucket, key, b"".join(parts[number] for number in listed), complete=True)

    def _insert(self, bucket: str, key: str, content: bytes, *, complete: bool = False) -> None:
        query = {"uploadType": "multipart"}
        if condition := self.headers.get("x-goog-if-generation-match"):
            query["ifGenerationMatch"] = condition
        # Name and content as two parts: uploads of the other kind forget the condition.
        border = uuid.uuid4().hex
        start = f"--{border}\r\nContent-Type: application/json\r\n\r\n{json.dumps({'name': key})}\r\n"
        start += f"--{border}\r\nContent-Type: application/octet-stream\r\n\r\n"
        status, answer = self.server.ask(
            "POST",
            f"/upload/storage/v1/b/{bucket}/o?{urlencode(query)}",
            start.encode() + content + f"\r\n--{border}--".encode(),
            f"multipart/related; boundary={border}",
        )
        if status != 200:
            self._fail(status, answer)
            return
        tag = json.loads(answer)["etag"].strip('"')
        body = _xml("CompleteMultipartUploadResult", ETag=f'"{tag}"') if complete else b""
        self._say(200, body, {"ETag": f'"{tag}"'})

    def do_DELETE(self) -> None:
        bucket, key, query = self._parsed()
        if "uploadId" in query:
            self.server.uploads.pop(query["uploadId"])
            self._say(204)
            return
        status, answer = self.server.ask("DELETE", _object(bucket, key))
        if status >= 300:
            self._fail(status, answer)
        else:
            self._say(204)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        bucket, key, query = self._parsed()
        if not key:
            self._list(bucket, query)
            return
        status, answer = self.server.ask("GET", _object(bucket, key))
        if status != 200:
            self._fail(status, answer)
            return
        found = json.loads(answer)
        headers = {"ETag": f'"{found["etag"].strip(chr(34))}"', "Last-Modified": _http_date(found["updated"])}
        size = int(found["size"])
        if self.command == "HEAD":
            self._say(200, b"", {**headers, "Content-Length": str(size)})
            return
        _, content = self.server.ask("GET", _object(bucket, key) + "?alt=media")
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            start, stop = int(wanted[1]), min(int(wanted[2]) + 1, size)
            if start >= size:
                self._fail(416, b"")
                return
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
            self._say(206, content[start:stop], headers)
        else:
            self._say(200, content, headers)

    def _list(self, bucket: str, query: dict[str, str]) -> None:
        after = query.get("start-after", "")
        names = {"prefix": "prefix", "delimiter": "delimiter", "continuation-token": "pageToken"}
        asked = {names[name]: value for name, value in query.items() if name in names}
        status, answer = self.server.ask(
            "GET", f"/storage/v1/b/{bucket}/o?{urlencode({**asked, 'startOffset': after, 'maxResults': '3'})}"
        )
        if status != 200:
            self._fail(status, answer)
            return
        found = json.loads(answer)
        inside = [
            _tag(
                "Contents",
                Key=item["name"],
                Size=item["size"],
                LastModified=item["updated"],
                ETag=item["etag"],
            )
            for item in found.get("items", ())
            # The other protocol's offset is part of what it lists.
            if item["name"] > after
        ]
        inside += [_tag("CommonPrefixes", Prefix=prefix) for prefix in found.get("prefixes", ())]
        if token := found.get("nextPageToken"):
            inside.append(f"<NextContinuationToken>{escape(token)}</NextContinuationToken>")
        self._say(200, f"<ListBucketResult>{''.join(inside)}</ListBucketResult>".encode())

    def _fail(self, status: int, answer: bytes) -> None:
        code = {404: "NoSuchKey", 412: "PreconditionFailed"}.get(status, "Error")
        self._say(status, _xml("Error", Code=code, Details=answer.decode(errors="replace")))

    def _say(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Silent."""


def _object(bucket: str, key: str) -> str:
    return f"/storage/v1/b/{bucket}/o/{quote(key, safe='')}"


def _tag(name: str, **fields: str) -> str:
    inside = "".join(f"<{field}>{escape(str(value))}</{field}>" for field, value in fields.items())
    return f"<{name}>{inside}</{name}>"


def _xml(name: str, **fields: str) -> bytes:
    return _tag(name, **fields).encode()


def _http_date(text: str) -> str:
    return format_datetime(datetime.fromisoformat(text))


@contextmanager
def running_front(target: str) -> Iterator[GcsFront]:
    """A translator that lives as long as the context."""
    with serving(GcsFront(target)) as server:
        yield server
