"""What is reached over the network: Metaflow's datastore, its metadata service, the hub; and the clocks there."""

import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Final

from metaflow_hf_cli.checks.findings import Check, Finding, ok, problem, warning

# Signed requests are refused when the clock is off by 15 minutes.
_SKEW_SECONDS: Final = 60.0
_SLOW_SECONDS: Final = 1.0


def checks() -> list[Check]:
    return [
        Check(
            "datastore",
            look_at_datastore,
            "check METAFLOW_DEFAULT_DATASTORE and METAFLOW_DATASTORE_SYSROOT_…, or run `metaflow configure`; for a "
            "bucket: credentials, region, and the right to list, read, write and delete below mf.hf/",
        ),
        Check("metaflow", look_at_metaflow, "export METAFLOW_USER=you"),
        Check("hub", look_at_hub, "check HF_ENDPOINT, or work with what is cached: export HF_HUB_OFFLINE=1"),
    ]


def look_at_datastore() -> Iterator[Finding]:
    from metaflow_hf.store import configured_store
    from metaflow_hf.store.probing import try_out

    store = configured_store()
    began = time.monotonic()
    seen = try_out(store)
    seconds = time.monotonic() - began
    told = f"{store.uri}: writes, reads, lists, deletes and creates atomically ({seconds:.2f} s)"
    if seconds / 6 > _SLOW_SECONDS:
        yield warning(
            "datastore",
            f"{told}, which is slow",
            "run near the bucket (same region), or look at the network in between",
        )
    else:
        yield ok("datastore", told)
    if "://" in store.uri and not store.uri.startswith("file://"):
        yield from skew("clock", "the datastore", seen)
        yield ok(
            "datastore",
            "uploads that were cut off stay until the bucket's lifecycle rule aborts them: have one "
            "(AbortIncompleteMultipartUpload after 7 days)",
        )


def look_at_metaflow() -> Iterator[Finding]:
    from metaflow import metaflow_config
    from metaflow.util import get_username

    user = get_username()
    if not user or user == "root":
        yield problem(
            "metaflow",
            "nobody says who runs the flows: Metaflow refuses to run them as root",
            "export METAFLOW_USER=you",
        )
        return
    where = metaflow_config.DEFAULT_METADATA
    service = f" at {metaflow_config.SERVICE_URL}" if where == "service" else ""
    yield ok(
        "metaflow", f"user {user}, metadata {where}{service}, datastore {metaflow_config.DEFAULT_DATASTORE}"
    )


def look_at_hub() -> Iterator[Finding]:
    from metaflow_hf import environment
    from metaflow_hf.hub.endpoint import Endpoint
    from metaflow_hf.hub.reaching import reach

    endpoint = Endpoint.of()
    if environment.is_offline():
        yield warning(
            "hub",
            "HF_HUB_OFFLINE is set: only what is cached can be loaded",
            "unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE to download",
        )
        return
    found = reach(endpoint)
    yield ok("hub", f"{endpoint} answers in {found.seconds:.2f} s")
    if found.date is not None:
        yield from skew("clock", "the hub", found.date)
    if found.user:
        yield ok("token", f"the hub knows you as {found.user}")
    elif found.has_token:
        yield problem(
            "token",
            "the hub does not accept the token in HF_TOKEN (or in the token file)",
            "make a new one at <hub>/settings/tokens, then export HF_TOKEN=… or run `hf auth login`",
        )
    else:
        yield ok("token", "none: public repositories only (HF_TOKEN or `hf auth login` for others)")
    proxies = [name for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY") if os.environ.get(name)]
    if proxies:
        yield ok("network", f"requests go through a proxy ({', '.join(proxies)}), but for {_direct()}")


def skew(subject: str, who: str, there: datetime) -> Iterator[Finding]:
    """How far this machine's clock is from the one of a server that was just asked."""
    seconds = abs((datetime.now(UTC) - there).total_seconds())
    if seconds > _SKEW_SECONDS:
        yield problem(
            subject,
            f"this machine's clock and that of {who} differ by {seconds:,.0f} s: signed requests will be refused",
            "set the clock: timedatectl set-ntp true, or ask who runs this machine",
        )
    else:
        yield ok(subject, f"agrees with {who}")


def _direct() -> str:
    from metaflow_hf import environment

    return ", ".join(environment.hosts_without_proxy()) or "no host"
