"""A hub of the test's own, whose content and answers it decides, and snapshots on an empty store."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import enable_progress_bars

from metaflow_hf.demo.content import HubContent
from metaflow_hf.demo.server import HubServer
from metaflow_hf.hub.client import HubClient, RetryPolicy
from metaflow_hf.hub.records import RunContext
from metaflow_hf.hub.request import SnapshotRequest
from metaflow_hf.hub.snapshots import Snapshots
from metaflow_hf.store import ObjectStore, open_store
from metaflow_hf.store.node_cache import NodeCache

SHARD_BYTES = 300_000
IMPATIENT = RetryPolicy(attempts=3, seconds=20, first_wait_seconds=0.01, max_wait_seconds=0.05)


def shard(seed: int) -> bytes:
    """A file large enough to be cut in the middle, different for each seed."""
    return random.Random(seed).randbytes(SHARD_BYTES)


@pytest.fixture(autouse=True)
def bars() -> None:
    """Progress bars as a new process has them: tasks of flows switch them off for their process."""
    enable_progress_bars()


@pytest.fixture
def files() -> dict[str, bytes]:
    """A model of four shards, as `acme/model` at main has it."""
    return {
        "README.md": b"# A model\n",
        "config.json": json.dumps({"model_type": "tiny"}).encode(),
        "tokenizer/vocab.txt": b"a\nb\nc\n",
        **{f"model-{n:05d}-of-00004.safetensors": shard(n) for n in range(1, 5)},
    }


@pytest.fixture
def own_hub(files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub with `acme/model`; `hf_friend` may read what is gated, `hf_owner` owns `acme`."""
    content = HubContent()
    content.add("acme/model", files)
    content.add("acme/gated", {"config.json": b"{}", "weights.bin": shard(9)}, gated=True)
    content.add("acme/private", {"config.json": b"{}"}, private=True)
    content.add_user("hf_friend", "friend", granted=("acme/gated",))
    content.add_user("hf_owner", "owner", namespaces=("acme",))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "METAFLOW_HF_EMBEDDED_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf-cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with HubServer(content, page_size=3) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_store(tmp_path / "store")


@pytest.fixture
def cache(tmp_path: Path) -> NodeCache:
    return NodeCache(tmp_path / "node")


Maker = Callable[..., Snapshots]


def impatient_client(request: SnapshotRequest) -> HubClient:
    return HubClient(request.endpoint, token=request.token, headers=request.headers, retry=IMPATIENT)


@pytest.fixture
def snapshots(store: ObjectStore, cache: NodeCache) -> Maker:
    """Makes `Snapshots` for a run of FlowX (run "1", step "start" unless said otherwise)."""

    def make(run: str | None = "1", step: str = "start", **options) -> Snapshots:
        namespace = options.pop("namespace", "user:tester")
        origin = options.pop("origin_run", None)
        context = None if run is None else RunContext("FlowX", run, step, "7", namespace, origin)
        options = {"client": impatient_client, "lease_seconds": 1.0, **options}
        return Snapshots(options.pop("store", store), options.pop("cache", cache), run=context, **options)

    return make


def request(repo_id: str = "acme/model", **arguments) -> SnapshotRequest:
    return SnapshotRequest.of(repo_id, **arguments)


@pytest.fixture(name="request_for")
def _request_for() -> Callable[..., SnapshotRequest]:
    return request


def read_tree(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.fixture(name="read_tree")
def _read_tree() -> Callable[[Path], dict[str, bytes]]:
    return read_tree
