"""The hub's errors as both families know them: ours, and huggingface_hub's of the same name.

``except`` clauses written for either library catch them. Importing this module loads huggingface_hub, so it is
imported where an error is raised, not before.
"""

from typing import Any

from huggingface_hub import errors as hf_errors

from metaflow_hf import errors


class _Answered:
    """An error made from a hub's answer; ``response`` is ``None`` when no answer is at hand."""

    response: Any
    request: Any
    request_id: str | None
    server_message: str | None

    def __init__(self, message: str, *, response: Any = None) -> None:
        Exception.__init__(self, message)  # type: ignore[arg-type]  # only ever mixed into exceptions
        self.response = response
        self.request_id = None
        self.server_message = None

    def __reduce_ex__(self, _protocol: Any) -> tuple[Any, ...]:
        return type(self), (str(self),)


class RepositoryNotFoundError(_Answered, errors.RepositoryNotFoundError, hf_errors.RepositoryNotFoundError):
    """The repository does not exist on this hub, or this user may not see it."""


class RevisionNotFoundError(_Answered, errors.RevisionNotFoundError, hf_errors.RevisionNotFoundError):
    """The repository has no such branch, tag or commit."""


class EntryNotFoundError(_Answered, errors.EntryNotFoundError, hf_errors.RemoteEntryNotFoundError):
    """The revision has no such file."""


class GatedRepoError(_Answered, errors.GatedRepoError, hf_errors.GatedRepoError):
    """The repository is gated and this user was not granted access."""


class AccessRefused(errors.HubUnavailable):
    """The hub did answer, and refused this token: what others cached of a restricted repository is no substitute."""


# What the configurations of transformers raise for values that no model can have.
ImpossibleValue = hf_errors.StrictDataclassError
