"""What the hub tells about repositories: information, trees, paths, refs, history, search, who am I."""

from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any
from urllib.parse import parse_qs, urlencode

import yaml

from metaflow_hf.demo.commits import FIRST_COMMIT, Commit, HubFile
from metaflow_hf.demo.content import HubContent, Repository, RepoType
from metaflow_hf.demo.protocol import (
    Answer,
    Refusal,
    Request,
    find_commit,
    identify,
    may_see,
    owner,
    require_download,
)


def repository_info(request: Request, repo: Repository, revision: str) -> Answer:
    """One repository at one revision; ``?blobs=true`` adds size and hashes, ``?expand=`` selects fields."""
    commit = find_commit(repo, revision)
    card = card_data(commit)
    info = {
        **summary(repo),
        "sha": commit.sha,
        "lastModified": _time(commit.created_at),
        "siblings": [_sibling(f, blobs=request.flag("blobs")) for f in commit.files.values()],
        "usedStorage": sum(f.size for f in commit.files.values()),
        "cardData": card,
        "disabled": False,
    }
    wanted = request.query.get("expand") or request.query.get("expand[]")
    if wanted:
        info = {k: v for k, v in info.items() if k in {"_id", "id", *wanted}}
    return Answer.of(info)


def summary(repo: Repository) -> dict[str, Any]:
    """What a search answers for one repository; known without building it."""
    info: dict[str, Any] = {
        "_id": repo.repo_id,
        "id": repo.repo_id,
        "author": owner(repo.repo_id) or None,
        "private": repo.private,
        "gated": "manual" if repo.gated else False,
        "downloads": repo.downloads,
        "likes": repo.likes,
        "tags": list(repo.labels),
        "createdAt": _time(FIRST_COMMIT),
        "lastModified": _time(FIRST_COMMIT),
    }
    if repo.repo_type == "model":
        info |= {"modelId": repo.repo_id, "library_name": "transformers"}
    return info


def card_data(commit: Commit) -> dict[str, Any]:
    """The YAML header of README.md; empty without one."""
    readme = commit.files.get("README.md")
    text = readme.data.decode("utf-8", errors="replace") if readme else ""
    if not text.startswith("---\n") or "\n---" not in text[4:]:
        return {}
    header = yaml.safe_load(text[4 : text.index("\n---", 3)])
    return header if isinstance(header, dict) else {}


def _sibling(file: HubFile, *, blobs: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {"rfilename": file.path}
    if blobs:
        entry |= {"size": file.size, "blobId": file.oid}
        if file.is_lfs:
            entry["lfs"] = {"size": file.size, "sha256": file.sha256, "pointerSize": file.pointer_size}
    return entry


def tree(request: Request, repo: Repository, revision: str, folder: str, page_size: int) -> Answer:
    """The entries of a folder, page by page. Raises Refusal (EntryNotFound) when there is no such folder."""
    commit = find_commit(repo, revision)
    if folder not in commit.trees:
        message = f"{folder} does not exist on {revision}"
        raise Refusal(404, "EntryNotFound", message, {"X-Repo-Commit": commit.sha})
    entries = list(_tree_entries(commit, folder, recursive=request.flag("recursive")))
    if request.flag("expand"):
        last = {"id": commit.sha, "title": commit.message, "date": _time(commit.created_at)}
        entries = [{**e, "lastCommit": last} for e in entries]
    return page(request, entries, page_size)


def _tree_entries(commit: Commit, folder: str, *, recursive: bool) -> Iterator[dict[str, Any]]:
    prefix = f"{folder}/" if folder else ""
    below = [p for p in (*commit.files, *commit.trees) if p.startswith(prefix) and p != folder]
    for path in sorted(below):
        if not recursive and "/" in path[len(prefix) :]:
            continue
        yield path_entry(commit, path)


def path_entry(commit: Commit, path: str) -> dict[str, Any]:
    file = commit.files.get(path)
    if file is None:
        return {"type": "directory", "oid": commit.trees[path], "size": 0, "path": path}
    entry = {"type": "file", "oid": file.oid, "size": file.size, "path": path}
    if file.is_lfs:
        entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": file.pointer_size}
    return entry


def paths_info(request: Request, repo: Repository, revision: str) -> Answer:
    """POST: the entries of the given paths; those that do not exist are left out."""
    commit = find_commit(repo, revision)
    if request.headers.get("Content-Type", "").startswith("application/json"):
        paths = request.json().get("paths", [])
    else:
        paths = parse_qs(request.body.decode()).get("paths", [])
    stripped = [p.strip("/") for p in paths]
    return Answer.of([path_entry(commit, p) for p in stripped if p in commit.files or p in commit.trees])


def refs(request: Request, repo: Repository) -> Answer:
    branches, tags, pulls = repo.refs()
    found: dict[str, Any] = {
        "branches": [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in branches.items()],
        "tags": [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": c} for n, c in tags.items()],
        "converts": [],
    }
    if request.flag("include_prs"):
        found["pullRequests"] = [{"name": n, "ref": n, "targetCommit": c} for n, c in pulls.items()]
    return Answer.of(found)


def history(request: Request, repo: Repository, revision: str, page_size: int) -> Answer:
    head = find_commit(repo, revision)
    return page(
        request,
        [
            {
                "id": c.sha,
                "title": c.message,
                "message": "",
                "date": _time(c.created_at),
                "authors": [{"user": "metaflow-hf"}],
            }
            for c in repo.history(head.sha)
        ],
        page_size,
    )


def auth_check(content: HubContent, request: Request, repo: Repository) -> Answer:
    """200 when this user may download. Raises Refusal (GatedRepo)."""
    require_download(content, request, repo)
    return Answer.of({})


def who_am_i(content: HubContent, request: Request) -> Answer:
    user = identify(content, request)
    if user is None:
        raise Refusal(401, message="Invalid username or password.")
    orgs = [{"type": "org", "name": name} for name in sorted(user.namespaces - {user.name})]
    token = {"displayName": "demo", "role": "write"}
    return Answer.of(
        {
            "type": "user",
            "name": user.name,
            "fullname": user.name,
            "orgs": orgs,
            "auth": {"type": "access_token", "accessToken": token},
        }
    )


_SORT_KEYS = ("downloads", "likes", "lastModified", "createdAt", "trendingScore")


def search(content: HubContent, request: Request, repo_type: RepoType, page_size: int) -> Answer:
    """Repositories that have every ``filter`` tag and every ``search`` word; most downloaded first by default."""
    user = identify(content, request)
    tags = {t for value in request.query.get("filter", []) for t in value.split(",")}
    words = [w.lower() for w in request.query.get("search", [])]
    author = request.query.get("author", [""])[0]
    gated = request.query.get("gated", [""])[0].lower()
    sort = request.query.get("sort", ["downloads"])[0]
    if sort not in _SORT_KEYS:
        raise Refusal(400, message=f'"sort" must be one of {", ".join(_SORT_KEYS)}, got {sort!r}')
    found = [
        summary(repo)
        for repo in content.repos(repo_type)
        if may_see(user, repo)
        and tags <= set(repo.labels)
        and all(w in repo.repo_id.lower() for w in words)
        and (not author or owner(repo.repo_id) == author)
        and (not gated or repo.gated == (gated == "true"))
    ]
    found.sort(key=lambda info: info["id"])
    found.sort(key=lambda info: info.get(sort, 0), reverse=request.query.get("direction", ["-1"]) != ["1"])
    return page(request, found, page_size)


def page(request: Request, entries: list[dict[str, Any]], page_size: int) -> Answer:
    """One page of ``entries``, with a Link to the next."""
    start = request.number("cursor", 0)
    stop = start + max(1, min(request.number("limit", page_size), page_size))
    if stop >= len(entries):
        return Answer.of(entries[start:])
    query = [*_pairs(request.query.items()), ("cursor", str(stop))]
    link = f'<{request.url}{request.path}?{urlencode(query)}>; rel="next"'
    return Answer.of(entries[start:stop], headers={"Link": link})


def _pairs(query: Iterable[tuple[str, list[str]]]) -> list[tuple[str, str]]:
    return [(name, value) for name, values in query if name != "cursor" for value in values]


def _time(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%S.000Z")
