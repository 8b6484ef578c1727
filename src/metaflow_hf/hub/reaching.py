"""Whether a hub can be reached from here, how fast, and as whom."""

import time
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus

from huggingface_hub import errors as hf_errors

from metaflow_hf.errors import HubUnavailable
from metaflow_hf.hub.endpoint import Endpoint
from metaflow_hf.hub.pace import TransportError

TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Reached:
    """A hub that answered: after how long, its clock, and the user whose token it accepted ("" for none)."""

    seconds: float
    date: datetime | None
    user: str
    has_token: bool


def has_token() -> bool:
    """Whether this process has a token to show to a hub: HF_TOKEN, or that of ``hf auth login``."""
    from huggingface_hub import get_token

    return get_token() is not None


def reach(endpoint: Endpoint) -> Reached:
    """Asks the hub for one model's name and for whose token this is. Raises ``HubUnavailable``."""
    from huggingface_hub import get_session, get_token
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    session, token = get_session(), get_token()
    began = time.monotonic()
    try:
        answer = session.get(
            f"{endpoint.url}/api/models",
            params={"limit": 1},
            headers=build_hf_headers(token=False),
            timeout=TIMEOUT_SECONDS,
        )
        seconds = time.monotonic() - began
        answer.raise_for_status()
        user = ""
        if token:
            headers = build_hf_headers(token=token)
            known = session.get(f"{endpoint.url}/api/whoami-v2", headers=headers, timeout=TIMEOUT_SECONDS)
            user = str(known.json().get("name", "")) if known.status_code == HTTPStatus.OK else ""
    except (TransportError, OSError, ValueError, hf_errors.HfHubHTTPError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise HubUnavailable(f"{endpoint.url} does not answer as a hub does: {reason:.200}.") from error
    date = answer.headers.get("date")
    return Reached(seconds, parsedate_to_datetime(date) if date else None, user, bool(token))
