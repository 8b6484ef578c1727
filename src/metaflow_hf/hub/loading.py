"""From a manifest to files, with the hub as the healer of snapshots whose stored bytes were damaged."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metaflow_hf import environment
from metaflow_hf.errors import IntegrityError, NotFound
from metaflow_hf.events import OnEvent, ignore
from metaflow_hf.hub.endpoint import Endpoint
from metaflow_hf.hub.linking import may_link
from metaflow_hf.hub.request import SnapshotRequest
from metaflow_hf.references import Reference, SnapshotRef
from metaflow_hf.store.datastore import configured_store
from metaflow_hf.store.manifests import Manifest
from metaflow_hf.store.materialize import materialize
from metaflow_hf.store.models import find_manifest
from metaflow_hf.store.node_cache import NodeCache, Verify
from metaflow_hf.store.objects import ObjectStore, quote_part

logger = logging.getLogger("metaflow_hf.hub")


def load_manifest(
    store: ObjectStore,
    key: str,
    manifest: Manifest,
    target: Path,
    *,
    cache: NodeCache,
    verify: Verify = "once",
    link_large: bool = False,
    materialize_mode: str | None = None,
    token: bool | str | None = None,
    on_event: OnEvent = ignore,
) -> Path:
    """Writes the manifest's files below ``target``, as ``store.materialize`` does.

    ``link_large`` says that ``target`` is a directory of ours, in which large files may be links unless
    ``materialize_mode`` forbids it (see ``may_link``).
    Damaged or lost blobs of a snapshot are downloaded again and healed, unless offline. Otherwise, and for models,
    raises ``IntegrityError`` or ``NotFound`` saying which file is lost.
    """
    link = may_link(materialize_mode) and link_large

    def write() -> Path:
        return materialize(store, manifest, target, cache=cache, verify=verify, link_large=link)

    try:
        return write()
    except (IntegrityError, NotFound) as error:
        request = _healing_request(key, manifest, token)
        if request is None:
            raise type(error)(f"{_name(key, manifest)} cannot be loaded: {error}") from error
        logger.warning("%s What is damaged is downloaded again from %s.", error, request.endpoint)
    _heal(store, cache, manifest, request, on_event)
    return write()


def _healing_request(key: str, manifest: Manifest, token: bool | str | None) -> SnapshotRequest | None:
    about = manifest.about
    if about.get("type") != SnapshotRef.TYPE or environment.is_offline():
        return None
    endpoint = Endpoint.of()
    if key.split("/")[1] != endpoint.key:
        logger.warning("%s came from another hub than %s, which cannot heal it", key, endpoint)
        return None
    return SnapshotRequest.of(
        about["repo_id"], repo_type=about["repo_type"], revision=about["commit_hash"], token=token
    )


def _heal(
    store: ObjectStore, cache: NodeCache, manifest: Manifest, request: SnapshotRequest, on_event: OnEvent
) -> None:
    from metaflow_hf.hub.client import HubClient
    from metaflow_hf.hub.fetch import Fetcher

    client = HubClient(request.endpoint, token=request.token)
    fetcher = Fetcher(store, cache, client, request, on_event)
    for file in manifest.files:
        try:
            cache.fetch(store, file)
        except (IntegrityError, NotFound):
            fetcher.fetch_again(request.revision, file)


def _name(key: str, manifest: Manifest) -> str:
    about = manifest.about
    return f"the {about.get('type', 'content')} {about.get('repo_id') or about.get('label') or ''} ({key})"


def load_reference(
    reference: Reference | Mapping[str, Any] | str,
    target: str | Path | None = None,
    *,
    verify: Verify = "once",
) -> Path:
    """The files of a reference or key from the datastore that Metaflow is configured with; see ``load_manifest``.

    Without ``target`` a fresh directory, which the caller removes.
    """
    store, cache = configured_store(), NodeCache.default()
    key, manifest = find_manifest(store, reference)
    label = str(manifest.about.get("label") or manifest.about.get("repo_id") or "model")
    place = Path(target) if target is not None else cache.new_work_dir(quote_part(label)[:60])
    return load_manifest(store, key, manifest, place, cache=cache, verify=verify, link_large=target is None)
