"""S3 as it is in production: busy, with parts, with few permissions, and credentials from wherever they come."""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from s3_proxy import S3Proxy

from metaflow_hf.errors import NotFound, StoreUnavailable
from metaflow_hf.hub.endpoint import Endpoint
from metaflow_hf.hub.names import Repo
from metaflow_hf.hub.records import Pins, Resolved, RunContext
from metaflow_hf.store import leases, open_store
from metaflow_hf.store.blobs import hash_file
from metaflow_hf.store.checkpoints import CheckpointTask, newest_checkpoint, save_checkpoint
from metaflow_hf.store.collection import collect
from metaflow_hf.store.models import load_directory, save_directory
from metaflow_hf.store.node_cache import NodeCache

WHO = {"flow": "FlowX", "run": "12", "step": "train", "task": "7"}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of three parts."""
    path = tmp_path_factory.mktemp("large") / "weights.bin"
    path.write_bytes(os.urandom(20_000_000))
    return path


def test_large_files_come_and_go_in_parts_through_slow_downs_and_lost_answers(
    proxy: S3Proxy, s3_root: str, large: Path, tmp_path: Path
):
    store, digest = open_store(s3_root), hash_file(large)
    # One meets the beginning of the upload, the others its parts.
    proxy.slow_down, proxy.drop = 3, 1
    assert store.upload(large, "blobs/large", expected=digest) == digest
    assert (proxy.slow_down, proxy.drop) == (0, 0)
    assert proxy.count("POST", "uploads") >= 1
    assert len({path for method, path in proxy.requests if method == "PUT" and "partNumber" in path}) == 3
    proxy.slow_down = 3
    assert store.download("blobs/large", tmp_path / "back", expected=digest) == digest
    assert proxy.slow_down == 0


def test_an_upload_that_is_given_up_shows_nothing(proxy: S3Proxy, s3_root: str, large: Path):
    store = open_store(s3_root)
    wrong = hash_file(large)
    with pytest.raises(Exception, match="damaged"):
        store.upload(large, "blobs/large", expected=type(wrong)(sha256="0" * 64, size=wrong.size))
    assert list(store.list()) == []
    assert proxy.count("DELETE", "uploadId") == 1


def test_every_kind_of_request_outlives_a_slow_down(proxy: S3Proxy, s3_root: str):
    store = open_store(s3_root)
    for request in (
        lambda: store.create("a/1", b"one").created,
        lambda: store.put("a/2", b"two"),
        lambda: store.get("a/1"),
        lambda: store.get_range("a/2", 1, 3),
        lambda: store.head("a/1"),
        lambda: list(store.list("a")),
        lambda: store.children("a"),
        lambda: store.delete("a/2"),
    ):
        proxy.slow_down = 2
        request()
        assert proxy.slow_down == 0
    assert [info.key for info in store.list()] == ["a/1"]


def test_nobody_needs_to_list_the_bucket_but_its_own_prefix(proxy: S3Proxy, s3_root: str, tmp_path: Path):
    proxy.may_list = "some/prefix/"
    store = open_store(s3_root)
    for key in ("a/b", "a/b.json", "a/c", "top"):
        store.put(key, b"x")
    # S3 tells 403 of what is missing, then.
    for read in (store.get, store.head, lambda key: store.get_range(key, 0, 1)):
        for key in ("no/such", "a/b.jso", "a", "a/b.json2", "to"):
            with pytest.raises(NotFound, match=key):
                read(key)
    with pytest.raises(NotFound):
        store.download("no/such", tmp_path / "x")
    assert store.get("a/b.json") == b"x"
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    saved = save_directory(store, model, **WHO)
    loaded = load_directory(store, saved, tmp_path / "out", cache=NodeCache(tmp_path / "node"))
    assert (loaded / "config.json").read_text() == "{}"
    assert collect(store).condemned == {}
    proxy.may_list = "other/"
    with pytest.raises(StoreUnavailable, match=r"was refused.*list there"):
        store.get("no/such")


def test_listings_that_lag_let_nobody_win_twice(proxy: S3Proxy, s3_root: str, tmp_path: Path):
    store = open_store(s3_root)
    model = tmp_path / "state"
    model.write_text("1")
    who = CheckpointTask(flow="F", run="1", step="s", task="2")
    run = RunContext("F", "1", "s", "2", "user:me")
    endpoint, repo = Endpoint.of("https://hub"), Repo.of("acme/model")
    pins = Pins(store, run)
    assert pins.get(endpoint, repo, "main") is None
    with proxy_lag(proxy):
        lease = leases.acquire(store, "leases/x", owner="a", ttl=60)
        assert lease is not None
        assert leases.acquire(store, "leases/x", owner="b", ttl=60) is None
        versions = [save_checkpoint(store, model, who).version for _ in range(3)]
        first, second = (Resolved(number * 40, False, datetime.now(UTC)) for number in "ab")
        assert pins.add(endpoint, repo, "main", first).commit_hash == "a" * 40
        assert pins.add(endpoint, repo, "main", second).commit_hash == "a" * 40
    assert versions == [1, 2, 3]
    assert newest_checkpoint(store, who, any_run=False).version == 3
    lease.release()


@contextmanager
def proxy_lag(proxy: S3Proxy) -> Iterator[None]:
    proxy.lists_lag = True
    yield
    proxy.lists_lag = False


class _Metadata(BaseHTTPRequestHandler):
    """The credentials of a role, as machines (IMDSv2) and containers are told them."""

    server: ThreadingHTTPServer

    def do_PUT(self) -> None:
        self._say(b"a-session" if self.path == "/latest/api/token" else b"")

    def do_GET(self) -> None:
        base = "/latest/meta-data/iam/security-credentials/"
        role = {
            "Code": "Success",
            "Type": "AWS-HMAC",
            "AccessKeyId": "role-key",
            "SecretAccessKey": "secret",
            "Token": "role-token",
            "Expiration": "2099-01-01T00:00:00Z",
        }
        is_known = self.path in (base, f"{base}training", "/container")
        self._say(b"training" if self.path == base else json.dumps(role).encode(), 200 if is_known else 404)

    def _say(self, body: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-aws-ec2-metadata-token-ttl-seconds", "21600")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args) -> None:
        """Silent."""


@pytest.fixture
def metadata() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Metadata)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("source", ["environment", "profile", "instance", "container"])
def test_credentials_come_from_where_boto3_finds_them(
    proxy: S3Proxy, s3_root: str, source: str, metadata: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-north-1")
    file = tmp_path / "credentials"
    file.write_text("[training]\naws_access_key_id = profile-key\naws_secret_access_key = secret\n")
    settings, expected = {
        "environment": (
            {"AWS_ACCESS_KEY_ID": "env-key", "AWS_SECRET_ACCESS_KEY": "s", "AWS_SESSION_TOKEN": "env-token"},
            ("env-key", "env-token"),
        ),
        "profile": (
            {"AWS_PROFILE": "training", "AWS_SHARED_CREDENTIALS_FILE": str(file)},
            ("profile-key", None),
        ),
        "instance": ({"AWS_EC2_METADATA_SERVICE_ENDPOINT": metadata}, ("role-key", "role-token")),
        "container": (
            {"AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{metadata}/container"},
            ("role-key", "role-token"),
        ),
    }[source]
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert open_store(s3_root).create("a", b"x").created
    assert proxy.who == {expected}


def test_without_credentials_the_error_says_so(proxy: S3Proxy, s3_root: str, monkeypatch, tmp_path: Path):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(StoreUnavailable, match=r"no AWS credentials were found"):
        open_store(s3_root).get("a")
