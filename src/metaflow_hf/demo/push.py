"""Writing to the hub: create a repository, send LFS content, commit, branch, tag."""

import base64
import binascii
import json
from typing import Any

import yaml

from metaflow_hf.demo.commits import HubFile
from metaflow_hf.demo.content import HubContent, Repository, RepoType
from metaflow_hf.demo.protocol import (
    Answer,
    Refusal,
    Request,
    find_commit,
    identify,
    require_write,
    visible_repository,
)


def create_repository(content: HubContent, request: Request) -> Answer:
    """A new, empty repository; 409 when it exists."""
    asked = request.json()
    repo_type: RepoType = "dataset" if asked.get("type") == "dataset" else "model"
    user = identify(content, request)
    owner_name = asked.get("organization") or (user.name if user else "")
    repo_id = f"{owner_name}/{asked['name']}"
    require_write(content, request, repo_id)
    private = asked.get("private") is True or asked.get("visibility") == "private"
    url = f"{request.url}/{'datasets/' if repo_type == 'dataset' else ''}{repo_id}"
    if content.find(repo_id, repo_type):
        return Answer.of({"error": "You already created this repo", "url": url}, 409)
    content.add(repo_id, {".gitattributes": b""}, repo_type=repo_type, private=private)
    return Answer.of({"url": url, "name": repo_id})


def validate_card(request: Request) -> Answer:
    """The YAML header of a README.md, before it is committed; 400 when it is not YAML."""
    text = request.json().get("content", "")
    header = text[4 : text.index("\n---", 3)] if text.startswith("---\n") and "\n---" in text[3:] else ""
    try:
        yaml.safe_load(header)
    except yaml.YAMLError as error:
        return Answer.of({"errors": [{"message": str(error)}], "warnings": []}, 400)
    return Answer.of({"errors": [], "warnings": []})


def preupload(content: HubContent, request: Request, repo: Repository, revision: str) -> Answer:
    """Which of the files go by LFS, by the same rule that commits follow."""
    require_write(content, request, repo.repo_id)
    files = find_commit(repo, revision).files
    modes = []
    for file in request.json()["files"]:
        path = file["path"]
        mode = "lfs" if HubFile.goes_by_lfs(path, file["size"]) else "regular"
        known = files[path].etag if path in files else None  # clients leave out what did not change
        modes.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": known})
    return Answer.of({"files": modes, "commitOid": find_commit(repo, revision).sha})


def lfs_batch(content: HubContent, request: Request, repo_type: RepoType, repo_id: str) -> Answer:
    """Where to PUT each LFS object; objects that the hub holds already need no upload."""
    repo = visible_repository(content, request, repo_type, repo_id)
    require_write(content, request, repo.repo_id)
    objects = []
    for wanted in request.json()["objects"]:
        entry: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"]}
        if content.stored(wanted["oid"]) is None:
            entry["actions"] = {"upload": {"href": f"{request.storage_url}/lfs/{wanted['oid']}"}}
        objects.append(entry)
    return Answer.of({"transfer": "basic", "objects": objects})


def store_content(content: HubContent, request: Request) -> Answer:
    """PUT of an LFS object on the storage port; 400 when the bytes are not those of the hash."""
    sha256 = request.path.rpartition("/")[2]
    if not content.store(sha256, request.body):
        raise Refusal(400, message=f"the bytes sent do not have the sha256 {sha256}")
    return Answer()


def commit(content: HubContent, request: Request, repo: Repository, revision: str) -> Answer:
    """The operations of an NDJSON body as one commit."""
    require_write(content, request, repo.repo_id)
    head = find_commit(repo, revision)
    changes: dict[str, bytes | None] = {}
    message = "update"
    for line in request.body.splitlines():
        item = json.loads(line)
        value = item["value"]
        match item["key"]:
            case "header":
                message = value.get("summary") or message
                if value.get("parentCommit") not in (None, head.sha):
                    raise Refusal(412, message="A commit has happened since. Please refresh and try again.")
            case "file":
                changes[value["path"]] = _decoded(value)
            case "lfsFile":
                changes[value["path"]] = _uploaded(content, value)
            case "deletedFile":
                changes[value["path"]] = None
            case "deletedFolder":
                folder = value["path"].rstrip("/") + "/"
                changes |= {p: None for p in head.files if p.startswith(folder)}
    for path, data in changes.items():
        if data is None and path not in head.files:
            raise Refusal(404, "EntryNotFound", f"A file with this name doesn't exist: {path}")
    branch = f"refs/pr/{len(repo.refs()[2]) + 1}" if request.flag("create_pr") else revision
    sha = repo.commit(changes, branch=branch, message=message)
    url = f"{request.url}/{'datasets/' if repo.repo_type == 'dataset' else ''}{repo.repo_id}"
    pull = f"{url}/discussions/{branch.rpartition('/')[2]}" if request.flag("create_pr") else None
    return Answer.of({"commitUrl": f"{url}/commit/{sha}", "commitOid": sha, "pullRequestUrl": pull})


def _decoded(value: dict[str, Any]) -> bytes:
    text = value["content"]
    if value.get("encoding") != "base64":
        return str(text).encode()
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise Refusal(400, message=f"{value['path']} is not base64: {error}") from error


def _uploaded(content: HubContent, value: dict[str, Any]) -> bytes:
    data = content.stored(value["oid"])
    if data is None:
        raise Refusal(400, message=f"the LFS object {value['oid']} of {value['path']} was not uploaded")
    return data


def create_branch(content: HubContent, request: Request, repo: Repository, name: str) -> Answer:
    require_write(content, request, repo.repo_id)
    if name in repo.refs()[0]:
        raise Refusal(409, message=f"Reference already exists: {name}")
    start = request.json().get("startingPoint", "main") if request.body else "main"
    repo.branch(name, find_commit(repo, start).sha)
    return Answer.of({})


def create_tag(content: HubContent, request: Request, repo: Repository, revision: str) -> Answer:
    require_write(content, request, repo.repo_id)
    name = request.json()["tag"]
    if name in repo.refs()[1]:
        raise Refusal(409, message=f"Tag reference exists already: {name}")
    repo.tag(name, find_commit(repo, revision).sha)
    return Answer.of({})
