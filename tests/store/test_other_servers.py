"""Azure's store, and an S3 server that cannot do what is needed; where they are installed (``make servers``)."""

import base64
import hashlib
import hmac
import os
import shutil
import socket
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from datetime import timedelta
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
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


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    """Starts an installed server; returns its port."""
    processes: list[subprocess.Popen] = []

    def start(name: str, *arguments: str, port_option: str) -> int:
        command = shutil.which(name) or shutil.which(name, path=INSTALLED)
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


def _make_container(url: str, name: str) -> None:
    """By a request that is signed with the account's key, as Azure documents it."""
    headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
    named = "".join(f"{header}:{value}\n" for header, value in sorted(headers.items()))
    text = "PUT" + 12 * "\n" + named + f"/{ACCOUNT}/{ACCOUNT}/{name}\nrestype:container"
    signature = hmac.digest(base64.b64decode(KEY), text.encode(), hashlib.sha256)
    headers["Authorization"] = f"SharedKey {ACCOUNT}:{base64.b64encode(signature).decode()}"
    request = urllib.request.Request(f"{url}/{name}?restype=container", method="PUT", headers=headers)
    urllib.request.urlopen(request, timeout=20).close()


@pytest.fixture
def azure(start, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    url = f"http://127.0.0.1:{start('azurite-blob', '--inMemoryPersistence', '--skipApiVersionCheck', port_option='--blobPort')}"
    options = {
        "account_name": ACCOUNT,
        "account_key": KEY,
        "endpoint": f"{url}/{ACCOUNT}",
        "client_options": {"allow_http": True},
    }
    retries: Any = {**opening.RETRY_CONFIG, "max_retries": 2, "retry_timeout": timedelta(seconds=10)}
    monkeypatch.setattr(opening, "RETRY_CONFIG", retries)
    with pytest.raises(StoreUnavailable, match=r"there is no az://container.*Create this bucket"):
        open_store("az://container/some/prefix", backend_options=options).put("a", b"x")
    _make_container(f"{url}/{ACCOUNT}", "container")
    return open_store("az://container/some/prefix", backend_options=options)


def test_azure_keeps_every_promise_of_a_store(azure: ObjectStore, tmp_path: Path):
    store = azure
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


def test_azure_lets_one_of_many_create(azure: ObjectStore):
    barrier, won = threading.Barrier(8), []

    def create(number: int) -> None:
        barrier.wait()
        won.extend(key for key in range(10) if azure.create(f"race/{key}", f"{number}".encode()).created)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == list(range(10))


def test_models_and_checkpoints_live_in_azure(azure: ObjectStore, tmp_path: Path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    saved = save_directory(azure, model, flow="F", run="1", step="s", task="2")
    loaded = load_directory(azure, saved, tmp_path / "out", cache=NodeCache(tmp_path / "node"))
    assert (loaded / "config.json").read_text() == "{}"
    who = CheckpointTask(flow="F", run="1", step="s", task="2")
    kept = save_checkpoint(azure, model, who)
    assert newest_checkpoint(azure, who, any_run=False) == kept


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
