"""An S3 server, for the commands as they are on a cloud."""

import urllib.request
from collections.abc import Iterator

import pytest


@pytest.fixture
def s3_root(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket on a server of this test's own, which Metaflow and boto3 of this process know."""
    from metaflow import metaflow_config
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        url = f"http://{host}:{port}"
        for name, value in {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        # Metaflow reads its settings once, at import.
        monkeypatch.setattr(metaflow_config, "S3_ENDPOINT_URL", url)
        request = urllib.request.Request(f"{url}/bucket", method="PUT")
        urllib.request.urlopen(request, timeout=30).close()
        yield "s3://bucket/metaflow"
    finally:
        server.stop()
