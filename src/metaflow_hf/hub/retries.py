"""Which failed questions are asked again, when, and what a log says of it."""

import logging
import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final

from metaflow_hf.errors import IntegrityError
from metaflow_hf.hub.pace import TransportError

MAX_RETRY_AFTER_SECONDS: Final = 60.0

_QUERY: Final = re.compile(r"(?<=\S)\?[^\s'\"]+")


class _RetryLine(logging.Filter):
    """Says in words what stamina notes as fields."""

    def filter(self, record: logging.LogRecord) -> bool:
        facts = record.__dict__
        if record.msg == "stamina.retry_scheduled":
            # Signed addresses are as good as a token while they last.
            reason = _QUERY.sub("?…", str(facts.get("stamina.caused_by")))
            record.msg = (
                f"no answer yet ({reason}); try {facts.get('stamina.retry_num', 0) + 1} "
                f"in {facts.get('stamina.wait_for', 0):.1f} s"
            )
        return True


def tell_retries() -> None:
    """Makes the retries of this process readable in its log. Idempotent."""
    stamina = logging.getLogger("stamina")
    if not any(isinstance(known, _RetryLine) for known in stamina.filters):
        stamina.addFilter(_RetryLine())


def wait_before_retry(error: Exception) -> bool | float:
    """Whether a question that failed so is asked again; in how many seconds, where the hub said so."""
    if isinstance(error, IntegrityError):
        return True
    response = getattr(error, "response", None)
    if response is None:
        return isinstance(error, TransportError)
    if response.status_code in (429, 503):
        after = _retry_after_seconds(response.headers.get("Retry-After", ""))
        return True if after is None else min(after, MAX_RETRY_AFTER_SECONDS)
    return bool(response.status_code >= 500 or response.status_code == 408)


def _retry_after_seconds(value: str) -> float | None:
    """What ``Retry-After`` says, in seconds or as a date of HTTP; ``None`` for anything else."""
    text = value.strip()
    if text.isascii() and text.isdecimal():
        return float(text)
    try:
        moment = parsedate_to_datetime(text)
    except ValueError:
        return None
    if moment.tzinfo is None:
        return None
    return max((moment - datetime.now(UTC)).total_seconds(), 0.0)
