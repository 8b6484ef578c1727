"""Which URL is answered by what: the paths that huggingface_hub and datasets ask for, and no others."""

import re
from urllib.parse import unquote

from metaflow_hf.demo import listing, push
from metaflow_hf.demo.content import HubContent, RepoType
from metaflow_hf.demo.files import resolve_file
from metaflow_hf.demo.protocol import Answer, Refusal, Request, visible_repository

_ID = r"(?P<id>[^/]+(?:/[^/]+)??)"  # one part (gpt2) or two; as short as the rest of the path allows
_FILE = re.compile(rf"/(?P<kind>datasets/)?{_ID}/resolve/(?P<rest>.+)")
_LFS_BATCH = re.compile(rf"/(?P<kind>datasets/)?{_ID}\.git/info/lfs/objects/batch")
_API = re.compile(
    rf"/api/(?P<kind>models|datasets)/{_ID}"
    r"(?:/(?P<verb>revision|tree|refs|auth-check|paths-info|commits|discussions|preupload|commit|branch|tag)"
    r"(?:/(?P<rest>.*))?)?"
)
_UNQUOTED_REF = re.compile(r"refs/(?:pr/\d+|convert/[^/]+)")


def answer(content: HubContent, request: Request, page_size: int) -> Answer:
    """The hub's answer. Raises Refusal for what it refuses or does not know."""
    if request.path in ("/api/models", "/api/datasets"):
        return listing.search(content, request, _type(request.path), page_size)
    if request.path == "/api/whoami-v2":
        return listing.who_am_i(content, request)
    if request.path == "/api/repos/create":
        return push.create_repository(content, request)
    if request.path == "/api/validate-yaml":
        return push.validate_card(request)
    if match := _API.fullmatch(request.path):
        return _repository_route(content, request, match, page_size)
    if match := _LFS_BATCH.fullmatch(request.path):
        return push.lfs_batch(content, request, _type(match["kind"]), unquote(match["id"]))
    if match := _FILE.fullmatch(request.path):
        revision, path = _revision_and_path(match["rest"])
        return resolve_file(content, request, _type(match["kind"]), unquote(match["id"]), revision, path)
    raise Refusal(404, message=f"this hub has nothing at {request.path}")


def _repository_route(content: HubContent, request: Request, match: re.Match[str], page_size: int) -> Answer:
    repo = visible_repository(content, request, _type(match["kind"]), unquote(match["id"]))
    revision, path = _revision_and_path(match["rest"] or "main")
    match request.method, match["verb"]:
        case "GET", None | "revision":
            return listing.repository_info(request, repo, revision)
        case "GET", "tree":
            return listing.tree(request, repo, revision, path, page_size)
        case "POST", "paths-info":
            return listing.paths_info(request, repo, revision)
        case "GET", "auth-check":
            return listing.auth_check(content, request, repo)
        case "GET", "refs":
            return listing.refs(request, repo)
        case "GET", "commits":
            return listing.history(request, repo, revision, page_size)
        case "GET", "discussions":
            return Answer.of({"discussions": [], "count": 0, "start": 0})
        case "POST", "preupload":
            return push.preupload(content, request, repo, revision)
        case "POST", "commit":
            return push.commit(content, request, repo, revision)
        case "POST", "branch":
            return push.create_branch(content, request, repo, revision)
        case "POST", "tag":
            return push.create_tag(content, request, repo, revision)
    raise Refusal(405, message=f"{request.method} is not answered here")


def _type(kind: str | None) -> RepoType:
    return "dataset" if kind and "datasets" in kind else "model"


def _revision_and_path(rest: str) -> tuple[str, str]:
    """The revision is one quoted component, except that some clients leave refs/pr/N unquoted."""
    if match := _UNQUOTED_REF.match(rest):
        return match[0], unquote(rest[match.end() :]).strip("/")
    revision, _, path = rest.partition("/")
    return unquote(revision), unquote(path).strip("/")
