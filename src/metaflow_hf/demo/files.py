"""The bytes of files: ``/{id}/resolve/{revision}/{path}`` and, for LFS content, the storage port.

Small files are answered directly. LFS files are answered by a redirect to another origin, as the real hub
does it: a client must take size and hash from the redirect and must not send its token on.
"""

import re
from urllib.parse import quote, unquote

from metaflow_hf.demo.content import HubContent, RepoType
from metaflow_hf.demo.protocol import (
    Answer,
    Refusal,
    Request,
    find_commit,
    require_download,
    visible_repository,
)

_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
LFS_PREFIX = "/lfs/"


def resolve_file(
    content: HubContent, request: Request, repo_type: RepoType, repo_id: str, revision: str, path: str
) -> Answer:
    """HEAD or GET of one file at one revision. Raises Refusal for whatever is missing or not permitted."""
    repo = visible_repository(content, request, repo_type, repo_id)
    require_download(content, request, repo)
    commit = find_commit(repo, revision)
    file = commit.files.get(path)
    headers = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
    if file is None:
        raise Refusal(404, "EntryNotFound", "Entry not found", headers)
    headers |= {"Content-Disposition": f'inline; filename="{_last(path)}"'}
    if file.is_lfs:
        location = f"{request.storage_url}{LFS_PREFIX}{file.sha256}/{quote(_last(path))}"
        linked = {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size), "Location": location}
        return Answer(302, b"", headers | linked)
    return ranged(request, file.data, {"ETag": f'"{file.etag}"', **headers})


def stored_content(content: HubContent, request: Request) -> Answer:
    """HEAD or GET on the storage port. The URL is the right to read, as with signed URLs."""
    sha256 = unquote(request.path).removeprefix(LFS_PREFIX).partition("/")[0]
    data = content.stored(sha256)
    if data is None:
        raise Refusal(404, message="no such object")
    return ranged(request, data, {"ETag": f'"{sha256}"', "Accept-Ranges": "bytes"})


def ranged(request: Request, data: bytes, headers: dict[str, str]) -> Answer:
    """The whole file (200) or the range that was asked for (206; 416 when it lies outside)."""
    headers = {"Content-Type": "application/octet-stream", **headers}
    match = _RANGE.fullmatch(request.headers.get("Range", "").strip())
    if match is None or match.groups() == ("", ""):
        return Answer(200, data, headers, is_file=True)
    first, last = match.groups()
    start = int(first) if first else max(len(data) - int(last), 0)
    stop = min(int(last) + 1, len(data)) if first and last else len(data)
    if start >= stop:
        raise Refusal(416, headers={"Content-Range": f"bytes */{len(data)}"})
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
    return Answer(206, data[start:stop], headers, is_file=True)


def _last(path: str) -> str:
    return path.rpartition("/")[2]
