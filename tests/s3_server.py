"""An S3 server on localhost, in a process of its own that can be made to stand still.

It is moto's; with ``TEST_S3_SERVER=localbucket`` in the environment, another one by other people, so that nothing depends
on what one server does by chance.
"""

import itertools
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
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


# Two requests of this server could otherwise both find that an object is missing, and create it.
_SERVE = """
import sys, threading
from moto.s3.responses import S3Response
from moto.server import main
lock, put = threading.Lock(), S3Response._key_response_put
def put_alone(*arguments, **keywords):
    with lock:
        return put(*arguments, **keywords)
S3Response._key_response_put = put_alone
main(sys.argv[1:])
"""


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
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as directory:
        if os.environ.get("TEST_S3_SERVER", "moto") == "moto":
            command = [sys.executable, "-c", _SERVE, "-H", "127.0.0.1", "-p", str(port)]
        else:
            assert os.environ["TEST_S3_SERVER"] == "localbucket"
            command = [f"{sysconfig.get_path('scripts')}/localbucket", "--port", str(port), directory]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_for(url, process)
            yield S3Server(url, process)
        finally:
            process.kill()
            process.wait()


def wait_for(url: str, process: subprocess.Popen) -> None:
    """Returns once the server answers, whatever it says."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except urllib.error.HTTPError:
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            assert process.poll() is None, "the server ended"
            time.sleep(0.1)
        else:
            return
    raise AssertionError("the server does not answer")
