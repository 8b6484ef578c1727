"""The embedded hub: one server in this process, so that the demo needs no network and no second terminal.

Each process that needs it has its own, on a free port; no task relies on another task's server. Content and
commit hashes are the same in all of them.
"""

import os
import threading

from metaflow_hf import environment
from metaflow_hf.demo.catalog import demo_content
from metaflow_hf.demo.server import HubServer

_lock = threading.Lock()
_server: HubServer | None = None


def ensure_running() -> str:
    """Start this process's hub, unless it runs already, and point the environment at it; returns its URL.

    Call it before huggingface_hub or datasets is imported: both read ``HF_ENDPOINT`` once, at import. Code
    that passes ``endpoint=`` with the returned URL to huggingface_hub works in either order.

    The server lives in a daemon thread until the process ends. A forked child keeps using its parent's server while
    the parent lives, and gets its own when it calls this function; a child started by exec inherits the parent's
    ``HF_ENDPOINT`` and should call it as well. Thread-safe.
    """
    global _server  # noqa: PLW0603  one per process is the point
    with _lock:
        if _server is None:
            _server = HubServer(demo_content()).start()
        point_environment_at(_server.url)
        return _server.url


def running_url() -> str | None:
    """The URL of this process's hub; None when it was not started."""
    return _server.url if _server else None


def point_environment_at(url: str) -> None:
    """Set ``HF_ENDPOINT`` and say (to `metaflow_hf.environment.embedded_endpoint`) that it is the embedded hub;
    keep proxies and Xet, which this hub does not speak, out of the way.

    The only place that writes to the environment.
    """
    os.environ["HF_ENDPOINT"] = url
    os.environ["METAFLOW_HF_EMBEDDED_ENDPOINT"] = url
    os.environ["HF_HUB_DISABLE_XET"] = "1"
    hosts = ",".join(dict.fromkeys([*environment.hosts_without_proxy(), "127.0.0.1"]))
    os.environ["NO_PROXY"] = hosts
    os.environ["no_proxy"] = hosts


def _after_fork() -> None:
    # The threads stayed in the parent; a child that held the listening sockets would let clients hang after
    # the parent's end instead of being refused.
    global _server, _lock  # noqa: PLW0603
    _lock = threading.Lock()
    if _server is not None:
        _server.abandon()
        _server = None


os.register_at_fork(after_in_child=_after_fork)
