"""A store that is away, full, read-only or not atomic gives one clear error, after bounded retries."""

import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from metaflow_hf.errors import IntegrityError, StoreUnavailable, UnsupportedStore
from metaflow_hf.store import Digest, ObjectStore, datastore, open_store, opening, probe
from metaflow_hf.store.objects import CreateResult


@pytest.fixture
def dead_endpoint(s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    from metaflow import metaflow_config

    with socket.socket() as probe_socket:
        probe_socket.bind(("127.0.0.1", 0))
        port = probe_socket.getsockname()[1]
    monkeypatch.setattr(metaflow_config, "S3_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    # A few retries show that they end; a minute of them would show nothing more.
    retries: Any = {**opening.RETRY_CONFIG, "max_retries": 3}
    monkeypatch.setattr(opening, "RETRY_CONFIG", retries)
    return f"http://127.0.0.1:{port}"


@pytest.mark.parametrize("request_name", ["get", "put", "create", "list", "head", "children", "delete"])
def test_a_dead_server_is_unavailable_after_bounded_retries(dead_endpoint: str, request_name: str):
    store = open_store("s3://bucket/prefix")
    requests = {
        "get": lambda: store.get("k"),
        "put": lambda: store.put("k", b""),
        "create": lambda: store.create("k", b""),
        "list": lambda: list(store.list("k")),
        "head": lambda: store.head("k"),
        "children": lambda: store.children("k"),
        "delete": lambda: store.delete("k"),
    }
    began = time.monotonic()
    with pytest.raises(StoreUnavailable, match="s3://bucket/prefix/k"):
        requests[request_name]()
    assert time.monotonic() - began < 30


def test_a_missing_bucket_is_not_a_missing_object_of_ours(s3_environment: dict[str, str]):
    store = open_store("s3://no-such-bucket/prefix")
    with pytest.raises((StoreUnavailable, LookupError), match="no-such-bucket"):
        store.create("k", b"")


def test_a_file_in_the_path_is_unavailable(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreUnavailable, match="file"):
        open_store(tmp_path / "file" / "store")
    store = open_store(tmp_path)
    for write in (lambda: store.create("file/x", b""), lambda: store.put("file/x", b"")):
        with pytest.raises(StoreUnavailable, match="file/x"):
            write()


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 1 MiB, which only root can mount."""
    mount = tmp_path / "small"
    mount.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("mounting a file system is not permitted here")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def test_a_full_disk_is_unavailable_and_leaves_nothing_half_visible(small_disk: Path, tmp_path: Path):
    store = open_store(small_disk)
    store.put("small", b"x")
    source = tmp_path / "source"
    source.write_bytes(b"y" * 2_000_000)
    with pytest.raises(StoreUnavailable, match="big"):
        store.upload(source, "big")
    with pytest.raises(StoreUnavailable, match="big"):
        store.create("big", b"y" * 2_000_000)
    assert [info.key for info in store.list()] == ["small"]
    assert store.get("small") == b"x"


def test_a_read_only_disk_is_unavailable(small_disk: Path):
    store = open_store(small_disk)
    store.put("before", b"x")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StoreUnavailable, match="after"):
        store.create("after", b"x")
    with pytest.raises(StoreUnavailable):
        probe(store)
    assert store.get("before") == b"x"


class _Overwriting:
    """A store whose create is check-then-write, as some S3 look-alikes answer."""

    uri = "s3://look-alike"

    def __init__(self, inner: ObjectStore) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def create(self, key: str, data: bytes) -> CreateResult:
        self._inner.put(key, data)
        return CreateResult(created=True, content=data)


def test_a_store_without_atomic_create_is_refused(tmp_path: Path):
    with pytest.raises(UnsupportedStore, match="put-if-absent"):
        probe(_Overwriting(open_store(tmp_path)))
    # It is not marked as good.
    assert list(open_store(tmp_path).list()) == []


@pytest.mark.parametrize("location", ["ftp://host/path", "s3://", "hdfs://x/y"])
def test_unknown_schemes_are_refused(location: str):
    with pytest.raises(UnsupportedStore, match="not a store"):
        open_store(location)


def test_a_changed_file_is_damaged(tmp_path: Path):
    source = tmp_path / "source"
    source.write_bytes(b"abc")
    with pytest.raises(IntegrityError, match=r"source.*expected 4 bytes.*found 3"):
        open_store(tmp_path / "store").upload(source, "k", expected=Digest(sha256="0" * 64, size=4))


def test_the_store_is_where_metaflow_is_configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datastore, "_active", None)
    datastore.activate("local", str(tmp_path / ".metaflow"))
    assert datastore.configured_location() == f"{tmp_path}/.metaflow/mf.hf"
    datastore.activate("s3", "s3://bucket/metaflow")
    assert datastore.configured_location() == "s3://bucket/metaflow/mf.hf"
    datastore.activate("azure", "container/metaflow")
    assert datastore.configured_location() == "az://container/metaflow/mf.hf"
    datastore.activate("gs", "gs://bucket/metaflow")
    assert datastore.configured_location() == "gs://bucket/metaflow/mf.hf"
    datastore.activate("tape", "x")
    with pytest.raises(UnsupportedStore, match="tape"):
        datastore.configured_location()
