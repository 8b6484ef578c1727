"""Which hub is asked. It is passed on explicitly: huggingface_hub reads its own once, when it is imported."""

from dataclasses import dataclass
from typing import Final, Self
from urllib.parse import urlsplit

from metaflow_hf import environment
from metaflow_hf.errors import SelectionError
from metaflow_hf.hub.names import endpoint_key

EMBEDDED_KEY: Final = "embedded"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A hub's address, and the key part that names it in the store.

    The embedded hub has another port in each process, so its key is ``embedded`` whatever the address.
    """

    url: str
    key: str

    @classmethod
    def of(cls, url: str | None = None) -> Self:
        """The hub at ``url`` (or ``embedded``, which must run), else at ``HF_ENDPOINT``, else the public one. Raises ``SelectionError``."""
        if url == EMBEDDED_KEY:
            url = environment.embedded_endpoint()
            if url is None:
                raise SelectionError(
                    "the embedded hub does not run in this process: METAFLOW_HF_HUB=embedded starts it in the tasks that "
                    "have @huggingface_hub, and `metaflow hf demo-hub` on its own."
                )
        address = (url or environment.hub_endpoint()).rstrip("/")
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SelectionError(
                f"the hub's endpoint {address!r} is not an http(s) address: check HF_ENDPOINT."
            )
        if parts.username or parts.password:
            raise SelectionError("the hub's endpoint must not hold a user or password: use HF_TOKEN.")
        if address == environment.embedded_endpoint():
            return cls(address, EMBEDDED_KEY)
        return cls(address, endpoint_key(parts.netloc + parts.path))

    def __str__(self) -> str:
        return self.url
