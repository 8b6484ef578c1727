"""Which datastore Metaflow is configured with: the one place of the library that asks Metaflow.

Inside a task the decorators say which datastore the run uses (``activate``); elsewhere, in notebooks, in the
command line or in plain scripts, Metaflow's own configuration decides.
"""

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from metaflow_hf.errors import UnsupportedStore
from metaflow_hf.store.objects import ObjectStore
from metaflow_hf.store.opening import open_store

logger = logging.getLogger("metaflow_hf.store")

PREFIX: Final = "mf.hf"
_SCHEMES: Final = {"s3": "s3", "gs": "gs", "azure": "az"}

_lock = threading.Lock()
_active: tuple[str, str] | None = None


def activate(ds_type: str, ds_root: str) -> None:
    """Says which datastore this process's run uses: Metaflow's type (``local``, ``s3``, …) and its root."""
    global _active  # noqa: PLW0603  one run a process
    with _lock:
        _active = (ds_type, ds_root)


def is_active() -> bool:
    """Whether this process runs a task of a flow, whose decorators said which datastore it uses."""
    return _active is not None


def configured_location() -> str:
    """Where ``mf.hf/`` lies: a directory path or a URI that ``open_store`` takes.

    Raises ``UnsupportedStore`` when Metaflow's datastore has no root configured or is of an unknown type.
    """
    ds_type, ds_root = _active or _configured_datastore()
    root = ds_root.rstrip("/")
    if ds_type in ("local", "spin"):
        return f"{root}/{PREFIX}"
    if ds_type not in _SCHEMES:
        raise UnsupportedStore(
            f"Metaflow's datastore is of type {ds_type!r}, which is not supported: use local, s3, gs or azure."
        )
    return f"{root if '://' in root else f'{_SCHEMES[ds_type]}://{root}'}/{PREFIX}"


def configured_store() -> ObjectStore:
    """The store below ``mf.hf/`` in the datastore that Metaflow uses. Raises as ``configured_location``."""
    return open_store(configured_location())


def existing_store() -> ObjectStore | None:
    """As ``configured_store``; ``None`` where a local one does not exist yet, which then is not made."""
    ds_type, ds_root = _active or _configured_datastore(create=False)
    if ds_type in ("local", "spin") and not (ds_root and Path(ds_root, PREFIX).is_dir()):
        return None
    return configured_store()


def _configured_datastore(*, create: bool = True) -> tuple[str, str]:
    from metaflow import metaflow_config
    from metaflow.plugins import DATASTORES

    wanted = str(metaflow_config.DEFAULT_DATASTORE)
    for storage in DATASTORES:
        if wanted == storage.TYPE:
            root = storage.get_datastore_root_from_config(logger.debug, create_on_absent=create)
            if not root and not create:
                return wanted, ""
            if not root:
                raise UnsupportedStore(
                    f"Metaflow's datastore is {wanted!r} but no root is configured: set "
                    f"METAFLOW_DATASTORE_SYSROOT_{wanted.upper()} or run `metaflow configure`."
                )
            return wanted, str(root)
    raise UnsupportedStore(f"METAFLOW_DEFAULT_DATASTORE={wanted!r} is none of Metaflow's datastores.")


def backend_options(scheme: str) -> dict[str, Any]:
    """Obstore's options for ``s3``, ``gs`` or ``az`` as Metaflow's configuration implies them."""
    return {"s3": _s3_options, "gs": _gs_options, "az": _azure_options}[scheme]()


def _s3_options() -> dict[str, Any]:
    from metaflow import metaflow_config
    from metaflow.plugins.aws.aws_client import get_aws_client

    client_params = dict(getattr(metaflow_config, "DATATOOLS_CLIENT_PARAMS", None) or {})
    # The client is asked for region and credentials only: whatever provider Metaflow is configured with
    # (profiles, roles, containers, its sandbox) resolves them as it does for Metaflow itself.
    client = get_aws_client("s3", client_params=dict(client_params))
    options: dict[str, Any] = {
        "region": client.meta.region_name or "us-east-1",
        "credential_provider": _aws_credentials(client),
    }
    endpoint = client_params.get("endpoint_url") or metaflow_config.S3_ENDPOINT_URL
    client_options: dict[str, Any] = {}
    if endpoint:
        options |= {"endpoint": endpoint, "virtual_hosted_style_request": False}
        client_options["allow_http"] = urlsplit(endpoint).scheme == "http"
    verify = client_params.get("verify", metaflow_config.S3_VERIFY_CERTIFICATE)
    if verify in (False, "False", "false", "0"):
        client_options["allow_invalid_certificates"] = True
    elif isinstance(verify, str) and verify not in ("True", "true", "1"):
        with open(verify, "rb") as bundle:  # noqa: PTH123
            client_options["root_certificate"] = bundle.read()
    if metaflow_config.S3_SERVER_SIDE_ENCRYPTION:
        options["server_side_encryption"] = metaflow_config.S3_SERVER_SIDE_ENCRYPTION
    return options | {"client_options": client_options}


def _aws_credentials(client: Any) -> Callable[[], dict[str, Any]]:
    import datetime as dt

    def provide() -> dict[str, Any]:
        # botocore has no public way from a client to its credentials; they refresh themselves.
        credentials = client._request_signer._credentials  # noqa: SLF001
        if credentials is None:
            raise PermissionError("no AWS credentials were found by boto3")
        frozen = credentials.get_frozen_credentials()
        expires = dt.datetime.now(dt.UTC) + dt.timedelta(minutes=5)
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": expires,
        }

    return provide


def _gs_options() -> dict[str, Any]:
    from metaflow.plugins.gcp.gs_storage_client_factory import get_credentials
    from obstore.auth.google import GoogleCredentialProvider

    credentials, _ = get_credentials(["https://www.googleapis.com/auth/devstorage.read_write"])
    return {"credential_provider": GoogleCredentialProvider(credentials)}


def _azure_options() -> dict[str, Any]:
    from metaflow.metaflow_config import AZURE_STORAGE_BLOB_SERVICE_ENDPOINT
    from obstore.auth.azure import AzureCredentialProvider

    if not AZURE_STORAGE_BLOB_SERVICE_ENDPOINT:
        raise UnsupportedStore("set METAFLOW_AZURE_STORAGE_BLOB_SERVICE_ENDPOINT to use the azure datastore.")
    parts = urlsplit(AZURE_STORAGE_BLOB_SERVICE_ENDPOINT)
    return {
        "account_name": parts.netloc.partition(".")[0],
        "endpoint": AZURE_STORAGE_BLOB_SERVICE_ENDPOINT,
        "credential_provider": AzureCredentialProvider(),
        "client_options": {"allow_http": parts.scheme == "http"},
    }
