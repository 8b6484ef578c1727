"""From a manifest to files, with the hub as the healer of snapshots whose stored bytes were damaged."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metaflow_hf import environment
from metaflow_hf.errors import IntegrityError, NotFound, StoreUnavailable
from metaflow_hf.events import OnEvent, ignore
from metaflow_hf.hub.endpoint import Endpoint
from metaflow_hf.hub.linking import may_link
from metaflow_hf.hub.request import SnapshotRequest
from metaflow_hf.references import Reference, SnapshotRef
from metaflow_hf.store.blobs import CONDEMNED
from metaflow_hf.store.datastore import configured_store
from metaflow_hf.store.manifests import Manifest
from metaflow_hf.store.materialize import materialize
from metaflow_hf.store.models import find_manifest
from metaflow_hf.store.node_cache import NodeCache, Verify
from metaflow_hf.store.objects import ObjectStore, encode_json, new_nonce, quote_part

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
    Damaged or lost blobs of a snapshot are downloaded again and healed, unless offline. Otherwise, and for models and
    checkpoints, raises ``IntegrityError`` (``ContentLost`` for lost ones) naming file, key and what to do; damaged
    bytes are then not used again, so that saving the same bytes anew mends what was saved before.
    """
    link = may_link(materialize_mode) and link_large

    def write() -> Path:
        return materialize(store, manifest, target, cache=cache, verify=verify, link_large=link)

    try:
        return write()
    except (IntegrityError, NotFound) as error:
        request = _healing_request(key, manifest, token)
        if request is None:
            _distrust(store, cache, manifest)
            text = f"{_name(key, manifest)} cannot be loaded: {error} {_remedy(key, manifest)}"
            raise type(error)(text) from error
        logger.warning("%s What is damaged is downloaded again from %s.", error, request.endpoint)
    _heal(store, cache, manifest, request, on_event)
    return write()


def _healing_request(key: str, manifest: Manifest, token: bool | str | None) -> SnapshotRequest | None:
    about = manifest.about
    if about.get("type") != SnapshotRef.TYPE or environment.is_offline():
        return None
    endpoint = Endpoint.of()
    if key.split("/")[1] != endpoint.key:
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


def _distrust(store: ObjectStore, cache: NodeCache, manifest: Manifest) -> None:
    """Condemns what is damaged, as a collection does with what nobody needs: the next writer stores it beside."""
    for file in manifest.files:
        try:
            cache.fetch(store, file)
        except NotFound:
            continue
        except IntegrityError:
            try:
                store.create(f"{CONDEMNED}/{file.blob}", encode_json({"nonce": new_nonce()}))
            except StoreUnavailable as error:
                logger.warning("%s is damaged, which cannot be noted: %s", file.blob, error)


def _remedy(key: str, manifest: Manifest) -> str:
    if manifest.about.get("type") != SnapshotRef.TYPE:
        return (
            "No hub has it: save the same files again, which mends this one too, load another, or forget this one by "
            f"`metaflow hf models rm {key}`."
        )
    if environment.is_offline():
        return "Offline nothing can be downloaded again: run once with HF_HUB_OFFLINE unset."
    return f"It came from {key.split('/')[1]}: set HF_ENDPOINT to that hub, and it is downloaded again."


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
