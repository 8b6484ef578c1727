"""Answers that trickle: cut off, so that they are asked for again, or somebody is told.

A time-out of HTTP bounds the silence between two reads, so one byte now and then would last for ever.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from huggingface_hub import errors as hf_errors

# httpx's base error, whichever httpx this huggingface_hub was built on.
TransportError: Final[type[Exception]] = hf_errors.HfHubHTTPError.__bases__[0]


class TooSlow(TransportError):  # type: ignore[misc, valid-type]  # noqa: N818  as httpx names its own
    """An answer came slower than is of use; asked for again like a connection that was lost."""


@dataclass(frozen=True, slots=True)
class Pace:
    """Fewer than ``bytes_per_second`` on average over any ``seconds`` is too slow, as for curl and git."""

    bytes_per_second: int = 1024
    seconds: float = 30.0

    def checked(
        self, chunks: Iterator[bytes], *, clock: Callable[[], float] = time.monotonic
    ) -> Iterator[bytes]:
        """The chunks as they come. Raises ``TooSlow``."""
        began, came = clock(), 0
        for chunk in chunks:
            came += len(chunk)
            yield chunk
            passed = clock() - began
            if passed >= self.seconds:
                if self.is_too_slow(came, passed):
                    raise TooSlow(f"{came} bytes in {passed:.0f} s")
                began, came = clock(), 0

    def is_too_slow(self, size: int, seconds: float) -> bool:
        """Whether ``size`` bytes in so many seconds are fewer than they must be."""
        return size < self.bytes_per_second * seconds

    def read(self, response: Any) -> bytes:
        """The whole body of a streamed answer. Raises ``TooSlow``."""
        return b"".join(self.checked(response.iter_bytes()))
