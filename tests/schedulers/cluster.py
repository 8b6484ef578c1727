"""As much of the Kubernetes API as deploying a workflow needs: objects of any kind are created, read and replaced."""

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import yaml


@dataclass
class Cluster:
    """What was deployed. `objects[kind]` is by name; `requests` are the methods and paths of all calls."""

    objects: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    url: str = ""
    _names: Iterator[int] = field(default_factory=itertools.count)

    def of_kind(self, plural: str) -> dict[str, dict[str, Any]]:
        """`workflowtemplates`, `workflows`, `cronworkflows` or `sensors`."""
        return self.objects.setdefault(plural, {})

    def submitted(self) -> dict[str, Any]:
        """The one workflow that was submitted since the last call."""
        [name] = self.of_kind("workflows")
        return self.of_kind("workflows").pop(name)

    def write_kubeconfig(self, path: Path) -> dict[str, str]:
        """Returns the environment in which Kubernetes' client talks to this server."""
        named = {"name": "here"}
        path.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "here",
                    "clusters": [{**named, "cluster": {"server": self.url}}],
                    "users": [{**named, "user": {}}],
                    "contexts": [{**named, "context": {"cluster": "here", "user": "here"}}],
                }
            )
        )
        return {"KUBECONFIG": str(path)}

    def answer(self, method: str, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self.requests.append((method, path))
        # …/namespaces/<namespace>/<plural>[/<name>]
        plural, *named = path.partition("/namespaces/")[2].split("/")[1:]
        known = self.of_kind(plural)
        if method == "POST":
            metadata = body["metadata"]
            name = metadata.setdefault("name", f"{metadata.get('generateName', '')}{next(self._names):05}")
            known[name] = body
        elif not named or named[0] not in known:
            return 404, {"kind": "Status", "code": 404, "message": f"{path} is not there"}
        else:
            [name] = named
            if method == "PUT":
                known[name] = body
            if method == "DELETE":
                return 200, known.pop(name)
        known[name]["metadata"].setdefault("resourceVersion", "1")
        return 201 if method == "POST" else 200, known[name]


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    cluster = Cluster()

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else {}
            status, answer = cluster.answer(self.command, self.path.partition("?")[0], body)
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_DELETE = handle_any

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        Thread(target=server.serve_forever, daemon=True).start()
        cluster.url = f"http://127.0.0.1:{server.server_port}"
        yield cluster
        server.shutdown()
