"""Objects, blobs, manifests and leases in the datastore that Metaflow is configured with.

``objects`` says what a store promises; ``obstore_backend`` keeps the promise on disks and clouds;
``datastore`` finds the one that Metaflow uses. On top: ``leases`` (who may do a job), ``blobs`` and
``manifests`` (bytes by content, and the lists that make a snapshot or model of them).
"""

from typing import TYPE_CHECKING, Any

from metaflow_hf.store.objects import CreateResult, Digest, ObjectInfo, ObjectStore, encode_json, quote_part

if TYPE_CHECKING:
    from metaflow_hf.store.datastore import configured_store
    from metaflow_hf.store.opening import open_store
    from metaflow_hf.store.probing import probe

__all__ = [
    "CreateResult",
    "Digest",
    "ObjectInfo",
    "ObjectStore",
    "configured_store",
    "encode_json",
    "open_store",
    "probe",
    "quote_part",
]


def __getattr__(name: str) -> Any:
    # obstore and Metaflow are loaded when they are first used.
    if name == "open_store":
        from metaflow_hf.store.opening import open_store

        return open_store
    if name == "probe":
        from metaflow_hf.store.probing import probe

        return probe
    if name == "configured_store":
        from metaflow_hf.store.datastore import configured_store

        return configured_store
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
