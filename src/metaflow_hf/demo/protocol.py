"""Requests and answers of the hub as values, and who may see which repository.

The routes are functions from a `Request` to an `Answer`; only `metaflow_hf.demo.server` knows sockets.
A route that cannot answer raises `Refusal`, which becomes the status and headers by which huggingface_hub
tells a missing repository from a missing revision, a missing file and a gated repository.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from metaflow_hf.demo.commits import Commit
from metaflow_hf.demo.content import HubContent, Repository, RepoType, RevisionMissing, User


@dataclass(frozen=True, slots=True)
class Request:
    """``path`` is as sent (still percent-encoded: a revision may hold ``%2F``), without the query."""

    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    body: bytes
    url: str  # of this server, as the client wrote it: links in answers must work for the client
    storage_url: str

    @property
    def token(self) -> str | None:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        return token if scheme == "Bearer" and token else None

    def flag(self, name: str) -> bool:
        return self.query.get(name, [""])[0].lower() in ("1", "true")

    def number(self, name: str, default: int) -> int:
        value = self.query.get(name, [""])[0]
        return int(value) if value.isdigit() else default

    def json(self) -> Any:
        try:
            return json.loads(self.body)
        except ValueError as error:
            raise Refusal(400, message=f"the body is not JSON: {error}") from error


@dataclass(frozen=True, slots=True)
class Answer:
    """``is_file`` marks (a part of) a repository's file, for the log."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    is_file: bool = False

    @classmethod
    def of(cls, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> "Answer":
        body = json.dumps(value).encode()
        return cls(status, body, {"Content-Type": "application/json; charset=utf-8", **(headers or {})})


class Refusal(Exception):  # noqa: N818  not an error of this program: an answer to a client
    """An answer other than success. ``code`` is the X-Error-Code that clients map to their exceptions."""

    def __init__(
        self,
        status: int,
        code: str = "",
        message: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, code, message)
        self.status, self.code, self.message = status, code, message
        self.headers = dict(headers or {})

    def answer(self) -> Answer:
        headers = dict(self.headers)
        if self.code:
            headers["X-Error-Code"] = self.code
        if self.message:
            headers["X-Error-Message"] = self.message
        return Answer.of({"error": self.message or self.code}, self.status, headers)


def identify(content: HubContent, request: Request) -> User | None:
    """Whose request this is. Raises Refusal for an unknown token where the hub rejects those."""
    user = content.user(request.token)
    if user is None and request.token and content.reject_unknown_tokens:
        raise Refusal(401, message="Invalid credentials in Authorization header")
    return user


def visible_repository(
    content: HubContent, request: Request, repo_type: RepoType, repo_id: str
) -> Repository:
    """The repository, if it exists and this user may know of it.

    Raises Refusal: RepoNotFound otherwise (401 to the anonymous, who might be allowed after logging in, 404
    to others), or a redirect to the new name of a renamed one.
    """
    user = identify(content, request)
    repo = content.find(repo_id, repo_type)
    if repo is None or not may_see(user, repo):
        status, hint = (404, "Repository not found") if user else (401, "Invalid username or password.")
        raise Refusal(status, "RepoNotFound", hint)
    if repo.repo_id != repo_id:
        moved = request.path.replace(f"/{quote(repo_id)}", f"/{quote(repo.repo_id)}", 1)
        query = "&".join(
            f"{quote(name)}={quote(v)}" for name, values in request.query.items() for v in values
        )
        raise Refusal(307, headers={"Location": moved + (f"?{query}" if query else "")})
    return repo


def may_see(user: User | None, repo: Repository) -> bool:
    return not repo.private or (user is not None and owner(repo.repo_id) in user.namespaces)


def owner(repo_id: str) -> str:
    return repo_id.partition("/")[0] if "/" in repo_id else ""


def require_download(content: HubContent, request: Request, repo: Repository) -> None:
    """Raises Refusal (GatedRepo) unless this user may download the repository's files."""
    if not repo.gated:
        return
    user = identify(content, request)
    if user is None:
        raise Refusal(
            401,
            "GatedRepo",
            f"Access to {repo.repo_type} {repo.repo_id} is restricted. You must have access to it and be "
            "authenticated to access it. Please log in.",
        )
    if repo.repo_id not in user.granted and owner(repo.repo_id) not in user.namespaces:
        raise Refusal(
            403,
            "GatedRepo",
            f"Access to {repo.repo_type} {repo.repo_id} is restricted and you are not in the authorized list. "
            f"Visit {request.url}/{repo.repo_id} to ask for access.",
        )


def require_write(content: HubContent, request: Request, repo_id: str) -> User:
    """Raises Refusal (401, 403) unless this user may write to the repository's owner."""
    user = identify(content, request)
    if user is None:
        raise Refusal(401, message="Invalid username or password.")
    if owner(repo_id) not in user.namespaces:
        raise Refusal(403, message=f"You have no right to write to {repo_id}.")
    return user


def find_commit(repo: Repository, revision: str) -> Commit:
    try:
        return repo.resolve(revision)
    except RevisionMissing:
        raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}") from None
