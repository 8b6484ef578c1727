"""What obstore's errors mean."""

from typing import Final

from obstore import exceptions as obstore_errors

from metaflow_hf.errors import NotFound, StoreUnavailable

_REFUSED: Final = (PermissionError, obstore_errors.PermissionDeniedError, obstore_errors.UnauthenticatedError)


class AccessDenied(StoreUnavailable):
    """The store refuses these credentials this request."""


class Taken(Exception):  # noqa: N818  never leaves the backend
    """The key is taken."""


def meaning_of(error: Exception, where: str) -> Exception:
    """The error of ours that says what ``error`` means; anything unknown is passed through unchanged."""
    if isinstance(error, FileNotFoundError):
        return NotFound(f"{where} does not exist.")
    if isinstance(error, (obstore_errors.AlreadyExistsError, obstore_errors.PreconditionError)):
        return Taken(where)
    text = str(error)
    reason = text.partition("\n")[0].strip()
    # Of listings obstore has no error of its own.
    if isinstance(error, _REFUSED) or "status code: 403" in text:
        return AccessDenied(
            f"access to {where} was refused: {reason}. Check the credentials and that they may read, write "
            "and list there."
        )
    if isinstance(error, (obstore_errors.BaseError, OSError)) and not isinstance(error, StoreUnavailable):
        return StoreUnavailable(
            f"{where} cannot be used: {reason}. Check that the datastore can be reached, may be written and has room."
        )
    return error
