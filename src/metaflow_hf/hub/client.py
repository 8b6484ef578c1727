"""Three questions to a hub: may I, which commit is it, and which files does it have.

Each is asked with a time limit and retried within bounds (429 with its ``Retry-After``, 5xx, connection errors);
what the hub answers, or does not, becomes an error of ours that says where and what to do.
"""

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, TypeVar
from urllib.parse import quote, urljoin, urlsplit

import stamina
from huggingface_hub import errors as hf_errors
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    build_hf_headers,
    get_session,
    hf_raise_for_status,
)

from metaflow_hf import environment
from metaflow_hf.errors import HubError, HubUnavailable, SelectionError
from metaflow_hf.hub import errors
from metaflow_hf.hub.endpoint import Endpoint
from metaflow_hf.hub.names import Repo, is_commit_hash
from metaflow_hf.hub.pace import Pace, TransportError
from metaflow_hf.hub.records import Resolved
from metaflow_hf.hub.retries import tell_retries, wait_before_retry

logger = logging.getLogger("metaflow_hf.hub")

T = TypeVar("T")

_CHECKSUM: Final = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")

TIMEOUT_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and for how long one question is repeated; ``seconds`` bounds all tries together."""

    attempts: int = 5
    seconds: float = 60.0
    first_wait_seconds: float = 0.5
    max_wait_seconds: float = 8.0


@dataclass(frozen=True, slots=True)
class Answer:
    """One whole answer; ``next_url`` is that of the next page, empty on the last."""

    status: int
    body: bytes
    next_url: str = ""

    def json(self) -> Any:
        """Raises ``ValueError`` for a body that is none."""
        return json.loads(self.body)


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a commit: ``oid`` is git's sha1 of its content, ``sha256`` is known for LFS files only."""

    path: str
    size: int
    oid: str
    sha256: str | None = None
    is_xet: bool = False


@dataclass(frozen=True, slots=True)
class HubClient:
    """One hub as one user sees it. ``token`` and ``headers`` as in huggingface_hub; neither is ever shown.

    Every method raises ``RepositoryNotFoundError``, ``GatedRepoError``, ``RevisionNotFoundError`` or
    ``HubUnavailable``.
    """

    endpoint: Endpoint
    token: bool | str | None = field(default=None, repr=False)
    headers: dict[str, str] | None = field(default=None, repr=False)
    timeout_seconds: float = TIMEOUT_SECONDS
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    pace: Pace = field(default_factory=Pace)

    def request_headers(self) -> dict[str, str]:
        """Headers of every request, with the user's token if there is one.

        Raises ``SelectionError``, which never shows the value, for what no header can carry.
        """
        # What is read from files and secret stores often ends with a line break.
        token = (self.token.strip() or None) if isinstance(self.token, str) else self.token
        try:
            headers = build_hf_headers(token=token, library_name="metaflow-hf", headers=self.headers)
        except hf_errors.LocalTokenNotFoundError as error:
            raise SelectionError(
                "token=True, but there is no token: set HF_TOKEN or run `hf auth login`."
            ) from error
        for name, value in headers.items():
            if not (value.isascii() and value.isprintable()):
                raise SelectionError(
                    f"the header {name!r} of requests to {self.endpoint.url} would hold control or foreign characters: "
                    "check the token or headers that you gave, and HF_TOKEN."
                )
        return headers

    def resolve(self, repo: Repo, revision: str) -> Resolved:
        """The commit that a revision names now, after checking that this user may download the repository."""
        api = f"/api/{repo.repo_type}s/{repo.repo_id}"
        what = f"{repo} at revision {revision!r}"
        answer = self._json(f"{api}/revision/{quote(revision, safe='')}", what)
        commit = answer.get("sha") if isinstance(answer, dict) else None
        if not isinstance(commit, str) or not is_commit_hash(commit):
            raise self._not_a_hub(what)
        # Information and tree of a gated repository are open to anyone; its files are not.
        with self._explained(what):
            self._repeat(lambda: self._get(f"{self.endpoint.url}{api}/auth-check"))
        return Resolved(
            commit_hash=commit,
            restricted=bool(answer.get("private") or answer.get("gated")),
            resolved_on=datetime.now(UTC),
        )

    def canonical_id(self, repo: Repo, commit_hash: str) -> str:
        """The hub's own id of a repository, where the user wrote an older one or one of one part."""
        answer = self._json(f"/api/{repo.repo_type}s/{repo.repo_id}/revision/{commit_hash}", str(repo))
        return str(answer.get("id") or repo.repo_id)

    def tags(self, repo: Repo, commit_hash: str) -> tuple[str, ...]:
        """The tags that the hub shows for a repository, such as ``modality:text``."""
        answer = self._json(f"/api/{repo.repo_type}s/{repo.repo_id}/revision/{commit_hash}", str(repo))
        return tuple(map(str, answer.get("tags") or ()))

    def tree(self, repo: Repo, commit_hash: str) -> list[RemoteFile]:
        """All files of a commit, listed page by page."""
        what = f"the files of {repo} at {commit_hash[:12]}"
        url = f"{self.endpoint.url}/api/{repo.repo_type}s/{repo.repo_id}/tree/{commit_hash}?recursive=true"
        files: list[RemoteFile] = []
        seen: set[str] = set()
        while url:
            seen.add(url)
            with self._explained(what):
                response = self._repeat(lambda page=url: self._get(page))  # type: ignore[misc]
            try:
                files += [_remote_file(item) for item in response.json() if item["type"] == "file"]
            except (ValueError, KeyError, TypeError) as error:
                raise self._not_a_hub(what) from error
            url = response.next_url
            if url in seen:
                raise self._not_a_hub(what)
        return files

    def file_url(self, repo: Repo, commit_hash: str, path: str) -> str:
        """Where the bytes of a file are asked for."""
        return f"{self.endpoint.url}/{repo.web_path}/resolve/{commit_hash}/{quote(path)}"

    def repeat(self, what: str, request: Callable[[], T]) -> T:
        """Runs any request under this client's retries and error messages."""
        with self._explained(what):
            return self._repeat(request)

    def _json(self, path: str, what: str) -> Any:
        with self._explained(what):
            response = self._repeat(lambda: self._get(self.endpoint.url + path))
        try:
            return response.json()
        except ValueError as error:
            raise self._not_a_hub(what) from error

    def get(self, url: str, headers: Mapping[str, str]) -> Answer:
        """One request, not repeated. Raises what huggingface_hub raises, and ``TooSlow`` for a body that trickles."""
        with get_session().stream(
            "GET", url, headers=headers, timeout=self.timeout_seconds, follow_redirects=True
        ) as response:
            hf_raise_for_status(response)
            following = response.links.get("next", {}).get("url", "")
            body = self.pace.read(response)
        return Answer(response.status_code, body, urljoin(url, following) if following else "")

    def _get(self, url: str) -> Answer:
        headers = self.request_headers()
        if urlsplit(url)[:2] != urlsplit(self.endpoint.url)[:2]:
            # A mirror may name the next page on another host: nobody but the user's hub sees the token.
            headers = build_hf_headers(token=False, library_name="metaflow-hf")
        return self.get(url, headers)

    def _repeat(self, request: Callable[[], T]) -> T:
        if environment.is_offline():
            raise hf_errors.OfflineModeIsEnabled("HF_HUB_OFFLINE=1")
        tell_retries()
        for attempt in stamina.retry_context(
            on=wait_before_retry,
            attempts=self.retry.attempts,
            timeout=self.retry.seconds,
            wait_initial=self.retry.first_wait_seconds,
            wait_max=self.retry.max_wait_seconds,
            wait_jitter=self.retry.first_wait_seconds,
        ):
            with attempt:
                return request()
        raise AssertionError("stamina either returns or raises")

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except HubError:
            raise
        except (TransportError, OSError) as error:
            raise self._explain(error, what) from error

    def _explain(self, error: Exception, what: str) -> Exception:
        """The error of ours for one of huggingface_hub's; those that say nothing about the hub pass unchanged."""
        hub, response = self.endpoint.url, getattr(error, "response", None)
        if isinstance(error, hf_errors.GatedRepoError):
            return errors.GatedRepoError(
                f"access to {what} on {hub} is gated: ask for it on its page and set HF_TOKEN to a token of the "
                "account that was granted access.",
                response=response,
            )
        if isinstance(error, hf_errors.RepositoryNotFoundError):
            return errors.RepositoryNotFoundError(
                f"{what}: {hub} has no such repository, or you may not see it. Check the spelling and repo_type; for "
                "a private one set HF_TOKEN.",
                response=response,
            )
        if isinstance(error, hf_errors.RevisionNotFoundError):
            return errors.RevisionNotFoundError(
                f"{what}: the repository on {hub} has no such branch, tag or commit. Check the spelling.",
                response=response,
            )
        if isinstance(error, hf_errors.EntryNotFoundError):
            return errors.EntryNotFoundError(f"{what}: {hub} has no such file.", response=response)
        if isinstance(error, hf_errors.OfflineModeIsEnabled):
            return HubUnavailable(
                f"{what} is not cached, and HF_HUB_OFFLINE=1 forbids asking {hub}. Run once online, or unset it."
            )
        if response is not None and response.status_code == 404:
            return self._not_a_hub(what)
        if response is not None and 400 <= response.status_code < 500 and not wait_before_retry(error):
            return errors.AccessRefused(
                f"{what}: {hub} refused the request ({response.status_code}). Check that HF_TOKEN is valid and may "
                "read this repository."
            )
        if isinstance(error, TransportError):
            return HubUnavailable(
                f"{what}: the hub at {hub} gave no usable answer ({_reason(error)}) within "
                f"{self.retry.attempts} tries and {self.retry.seconds:.0f} s. Check the network and HF_ENDPOINT; HF_HUB_OFFLINE=1 uses what is "
                "cached already."
            )
        return error

    def _not_a_hub(self, what: str) -> HubUnavailable:
        return HubUnavailable(
            f"{what}: what answers at {self.endpoint.url} is not a Hugging Face hub. Check HF_ENDPOINT, proxy and "
            "firewall."
        )


def _remote_file(item: dict[str, Any]) -> RemoteFile:
    lfs = item.get("lfs")
    file = RemoteFile(
        path=str(item["path"]),
        size=int(lfs["size"] if lfs else item["size"]),
        oid=str(item["oid"]),
        sha256=str(lfs["oid"]) if lfs else None,
        is_xet=bool(item.get("xetHash")),
    )
    # The checksums name files on this node: they must be nothing else.
    names = [file.oid] if file.sha256 is None else [file.sha256]
    if file.size < 0 or not all(_CHECKSUM.fullmatch(name) for name in names):
        raise ValueError(f"{file.path!r} has no valid size or checksum")
    return file


def _reason(error: Exception) -> str:
    response = getattr(error, "response", None)
    if response is not None:
        return f"HTTP {response.status_code}"
    return f"{type(error).__name__}: {error}".partition("\n")[0].rstrip(": ")
