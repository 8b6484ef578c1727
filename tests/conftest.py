"""Fixtures for all tests: a hub on localhost, and an environment that knows no other."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from s3_server import S3Server, running_s3_server

from metaflow_hf.demo.content import HubContent
from metaflow_hf.demo.server import HubServer
from metaflow_hf_cli.fixtures import fixture_content

# As many processes as there are cores are at work: threads of theirs would only wait for each other, and turn meanwhile.
os.environ.setdefault("OMP_NUM_THREADS", "1")
_CLEARED = (
    "HF_DATASETS_CACHE",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "HF_TOKEN",
    "HF_TOKEN_PATH",
    "HUGGING_FACE_HUB_TOKEN",
    "METAFLOW_HF_EMBEDDED_ENDPOINT",
    "METAFLOW_HF_HUB",
    "TRANSFORMERS_OFFLINE",
)
REPOSITORY = Path(__file__).resolve().parents[1]
# Files that run for minutes begin first, so that no worker is left alone with one of them at the end; those that compute
# and those that wait in turns, so that the cores have something to do.
_FIRST = (
    "integration/test_demo",
    "faults/test_rounds_soak",
    "integration/scheduled/test_trainings",
    "integration/test_init",
    "faults/test_rounds_processes",
    "faults/test_rounds_simulation",
    "integration",
    "faults",
    "extension",
)


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: much of what a test does is to wait for a lease, a server or a process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In the order of ``_FIRST``, by the first that a path begins with, then everything else as it was collected."""

    def rank(item: pytest.Item) -> int:
        path = item.path.relative_to(REPOSITORY / "tests").as_posix()
        return next((rank for rank, first in enumerate(_FIRST) if path.startswith(first)), len(_FIRST))

    items.sort(key=rank)


@pytest.fixture(scope="session")
def hub_server() -> Iterator[HubServer]:
    """One server for the whole session, with the repositories of `metaflow_hf_cli.fixtures`.

    Tests that change its content start one of their own: ``start_hub(fixture_content())``.
    """
    with HubServer(fixture_content()) as server:
        yield server


@pytest.fixture
def hub(hub_server: HubServer, hub_environment: dict[str, str], monkeypatch) -> Iterator[HubServer]:
    """The session's hub with an empty log and no faults; the environment of this process points at it.

    huggingface_hub reads its endpoint and cache directory at import, so these are set in its constants too.
    """
    hub_server.log.clear()
    hub_server.faults.clear()
    for name, value in hub_environment.items():
        monkeypatch.setenv(name, value)
    point_libraries_at(hub_server.url, Path(hub_environment["HF_HOME"]), monkeypatch)
    yield hub_server
    hub_server.faults.clear()


@pytest.fixture
def start_hub(hub_environment: dict[str, str], monkeypatch) -> Iterator[Callable[..., HubServer]]:
    """Starts a server of the test's own, with any content and the arguments of `HubServer`; the libraries of this
    process (and its environment) point at the one that was started last.
    """
    with ExitStack() as servers:

        def start(content: HubContent, **settings) -> HubServer:
            server = servers.enter_context(HubServer(content, **settings))
            for name, value in {**hub_environment, "HF_ENDPOINT": server.url}.items():
                monkeypatch.setenv(name, value)
            point_libraries_at(server.url, Path(hub_environment["HF_HOME"]), monkeypatch)
            return server

        yield start


@pytest.fixture
def hub_environment(hub_server: HubServer, tmp_path: Path, monkeypatch) -> dict[str, str]:
    """What a subprocess needs in its environment (besides PATH) to use the session's hub, and nothing else's.

    Tokens are cleared from this process's environment as well.
    """
    for name in _CLEARED:
        monkeypatch.delenv(name, raising=False)
    return {
        "HF_ENDPOINT": hub_server.url,
        "HF_HOME": str(tmp_path / "hf-home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "METAFLOW_HF_CACHE": str(tmp_path / "node-cache"),
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }


@pytest.fixture
def subprocess_environment(hub_environment: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """A whole environment for a subprocess: this one's, the hub's, and this checkout on the path."""
    path = os.pathsep.join([str(REPOSITORY / "src"), str(REPOSITORY)])
    return {
        **os.environ,
        **hub_environment,
        "PYTHONPATH": path,
        "METAFLOW_USER": "tester",
        "OMP_NUM_THREADS": "1",
    }


def point_libraries_at(url: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make an already imported huggingface_hub use this endpoint and this cache."""
    from huggingface_hub import HfFileSystem, constants, hf_api

    cache = home / "hub"
    values = {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(cache),
        "HUGGINGFACE_HUB_CACHE": str(cache),
        "HF_ASSETS_CACHE": str(home / "assets"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_OFFLINE": False,
    }
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", url)
    HfFileSystem.clear_instance_cache()
    if "datasets" in sys.modules:
        from datasets import config

        monkeypatch.setattr(config, "HF_ENDPOINT", url)
        monkeypatch.setattr(config, "HF_CACHE_HOME", str(home))
        monkeypatch.setattr(config, "HF_DATASETS_CACHE", home / "datasets")
        monkeypatch.setattr(config, "HF_MODULES_CACHE", str(home / "modules"))


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """An S3 server of this test process; each test takes a bucket of its own."""
    with running_s3_server() as server:
        yield server


@pytest.fixture
def s3_environment(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Metaflow's and boto3's settings for the S3 server, in this process and for children."""
    from metaflow import metaflow_config

    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    # Metaflow reads its settings once, at import.
    monkeypatch.setattr(metaflow_config, "S3_ENDPOINT_URL", s3_server.url)
    return s3_server.environment


@pytest.fixture
def s3_root(s3_server: S3Server, s3_environment: dict[str, str]) -> str:
    """An empty bucket with a prefix, as a URI."""
    return s3_server.new_bucket()


@pytest.fixture
def s3_datastore(s3_server: S3Server) -> dict[str, str]:
    """The environment in which a flow finds an empty datastore on the S3 server."""
    return {**s3_server.environment, "METAFLOW_DATASTORE_SYSROOT_S3": s3_server.new_bucket()}
