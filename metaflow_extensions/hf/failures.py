"""Errors of ours as Metaflow shows its own: a headline and what to do, without pages of traceback."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from metaflow.exception import MetaflowException

from metaflow_hf.errors import MetaflowHFError


class Failure(MetaflowException):
    """An error of metaflow-hf on its way to the user; the error itself is its ``__cause__``."""

    def __init__(self, error: MetaflowHFError) -> None:
        super().__init__(str(error))
        self.headline = type(error).__name__


@contextmanager
def explained() -> Iterator[None]:
    """Turns errors of metaflow-hf that leave the block into ``Failure``."""
    try:
        yield
    except MetaflowHFError as error:
        raise Failure(error) from error


def parse_config(text: str) -> dict[str, Any]:
    """The parser of a flow's ``Config`` of settings for training: mistakes are listed before a run begins."""
    from metaflow_hf import config

    with explained():
        return config.parse_config(text)


class _RetryLine(logging.Filter):
    """Says in words what stamina notes as fields."""

    def filter(self, record: logging.LogRecord) -> bool:
        facts = record.__dict__
        if record.msg == "stamina.retry_scheduled":
            record.msg = (
                f"no answer yet ({facts.get('stamina.caused_by')}); try {facts.get('stamina.retry_num', 0) + 1} "
                f"in {facts.get('stamina.wait_for', 0):.1f} s"
            )
        return True


def tell_retries() -> None:
    """Makes the retries of this process readable in its log. Idempotent."""
    stamina = logging.getLogger("stamina")
    if not any(isinstance(known, _RetryLine) for known in stamina.filters):
        stamina.addFilter(_RetryLine())
