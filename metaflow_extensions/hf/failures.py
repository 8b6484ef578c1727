"""Errors of ours as Metaflow shows its own: a headline and what to do, without pages of traceback."""

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
        self._error = error

    def __reduce__(self) -> tuple[Any, ...]:
        # Whoever catches it in another process gets the same headline.
        return type(self), (self._error,)


@contextmanager
def explained() -> Iterator[None]:
    """Turns errors of metaflow-hf that leave the block into ``Failure``."""
    try:
        yield
    except MetaflowHFError as error:
        raise Failure(error) from error
