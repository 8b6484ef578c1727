"""An S3 server on localhost, in a process of its own that can be made to stand still."""

import itertools
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
}


class S3Server:
    """A running server; ``environment`` makes Metaflow and boto3 use it."""

    def __init__(self, url: str, process: subprocess.Popen) -> None:
        self.url = url
        self._process = process
        self._names = itertools.count()

    @property
    def environment(self) -> dict[str, str]:
        return {**CREDENTIALS, "METAFLOW_S3_ENDPOINT_URL": self.url}

    def new_bucket(self) -> str:
        """An empty bucket with a prefix, as a URI."""
        name = f"bucket-{os.getpid()}-{next(self._names)}"
        urllib.request.urlopen(urllib.request.Request(f"{self.url}/{name}", method="PUT"), timeout=10).close()
        return f"s3://{name}/some/prefix"

    @contextmanager
    def away(self) -> Iterator[None]:
        """Nobody is answered meanwhile."""
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)


@contextmanager
def running_s3_server() -> Iterator[S3Server]:
    """A server that lives as long as the context."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(url, process)
        yield S3Server(url, process)
    finally:
        process.kill()
        process.wait()


def _wait(url: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"{url}/moto-api/", timeout=5).close()
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            assert process.poll() is None, "the S3 server ended"
            time.sleep(0.1)
        else:
            return
    raise AssertionError("the S3 server does not answer")
