"""Where datasets go when no place is named."""

from metaflow_hf.environment import node_cache_root
from metaflow_hf.store import ObjectStore, open_store


def datasets_root() -> ObjectStore:
    """Where datasets go when no place is named: the running flow's datastore, else the user's cache."""
    from metaflow_hf.store import datastore

    return datastore.configured_store() if datastore.is_active() else open_store(node_cache_root())
