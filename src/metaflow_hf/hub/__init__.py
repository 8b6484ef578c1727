"""Snapshots of hub repositories through the cache in Metaflow's datastore.

``snapshots`` is the path from a revision to a reference; ``client`` asks the hub, ``transfer`` brings one file,
``fetch`` all that is missing. The functions here take huggingface_hub's arguments and return local paths.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metaflow_hf.hub.cache_info import scan_cache
    from metaflow_hf.hub.downloads import download_large_model, download_many, production_download
    from metaflow_hf.hub.local import hf_hub_download, resolve_revision, snapshot_download
    from metaflow_hf.hub.search import search_datasets
    from metaflow_hf.hub.upload import push

__all__ = [
    "download_large_model",
    "download_many",
    "hf_hub_download",
    "production_download",
    "push",
    "resolve_revision",
    "scan_cache",
    "search_datasets",
    "snapshot_download",
]

_MODULES = {
    "download_large_model": "downloads",
    "download_many": "downloads",
    "hf_hub_download": "local",
    "production_download": "downloads",
    "push": "upload",
    "resolve_revision": "local",
    "scan_cache": "cache_info",
    "search_datasets": "search",
    "snapshot_download": "local",
}


def __getattr__(name: str) -> Any:
    # The store and huggingface_hub are loaded when they are first used.
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
