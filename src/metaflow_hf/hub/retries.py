"""What a log says of a question that is asked again."""

import logging
import re
from typing import Final

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
