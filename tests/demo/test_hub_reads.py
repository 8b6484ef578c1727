"""huggingface_hub, unchanged, against the hub on localhost: what is found, and what is missing."""

import hashlib
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

from metaflow_hf.demo.content import HubContent
from metaflow_hf.demo.server import HubServer
from metaflow_hf_cli.fixtures import PULL_REQUEST_ID, RENAMED_FROM, RENAMED_TO, TAGGED_ID


def read_folder(path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in Path(path).rglob("*") if p.is_file()}


def committed(hub: HubServer, repo_id: str, revision: str = "main") -> dict[str, bytes]:
    return {name: file.data for name, file in hub.content.repo(repo_id).resolve(revision).files.items()}


def test_a_snapshot_holds_every_byte_of_the_commit(hub):
    path = Path(huggingface_hub.snapshot_download("bert-base-uncased"))
    assert read_folder(path) == committed(hub, "bert-base-uncased")
    assert path.name == hub.content.repo("bert-base-uncased").resolve("main").sha


def test_what_is_cached_is_not_sent_again(hub):
    huggingface_hub.snapshot_download("bert-base-uncased")
    with hub.log.new() as log:
        huggingface_hub.snapshot_download("bert-base-uncased")
    assert log.file_bytes() == 0
    assert hub.log.file_bytes() > 1 << 20


def test_a_large_file_comes_from_another_origin_and_its_redirect_tells_size_and_hash(hub):
    path = huggingface_hub.hf_hub_download("bert-base-uncased", "model.safetensors", token="hf_reader")

    (redirect,) = hub.log.entries("HEAD", "*/model.safetensors")
    (sent,) = hub.log.entries("GET", "/lfs/*/model.safetensors")
    assert redirect.status == 302
    assert redirect.has_token
    assert not sent.has_token, "a token must not leave the hub"
    assert sent.role == "storage"
    assert sent.path.split("/")[2] == hashlib.sha256(Path(path).read_bytes()).hexdigest()


@pytest.mark.parametrize("filename", ["model.safetensors", "config.json"])
def test_size_hash_and_commit_are_known_before_the_first_byte(hub, filename):
    commit = hub.content.repo("bert-base-uncased").resolve()
    file = commit.files[filename]
    metadata = get_hf_file_metadata(hf_hub_url("bert-base-uncased", filename))

    assert (metadata.size, metadata.etag, metadata.commit_hash) == (file.size, file.etag, commit.sha)
    assert metadata.location.startswith(hub.storage_url if file.is_lfs else hub.url)
    assert metadata.xet_file_data is None
    (asked,) = hub.log.entries()
    assert (asked.method, asked.body_bytes) == ("HEAD", 0)


def test_each_kind_of_revision_gives_its_own_files(hub):
    repo = hub.content.repo(TAGGED_ID)
    tagged = repo.resolve("v1.0").sha
    for revision in ("main", "v1.0", "dev", tagged, tagged[:8]):
        path = huggingface_hub.hf_hub_download(TAGGED_ID, "README.md", revision=revision)
        assert Path(path).read_bytes() == committed(hub, TAGGED_ID, revision)["README.md"]
    assert committed(hub, TAGGED_ID, "main")["README.md"] != committed(hub, TAGGED_ID, "v1.0")["README.md"]


def test_a_pull_request_is_a_revision(hub):
    path = huggingface_hub.snapshot_download(PULL_REQUEST_ID, revision="refs/pr/42")
    assert read_folder(path) == committed(hub, PULL_REQUEST_ID, "refs/pr/42")
    assert b"Proposed" in (Path(path) / "README.md").read_bytes()


def test_a_renamed_repository_is_found_under_its_old_name(hub):
    assert HfApi().model_info(RENAMED_FROM).id == RENAMED_TO
    assert HfApi().dataset_info("imdb").id == "stanfordnlp/imdb"
    path = huggingface_hub.snapshot_download(RENAMED_FROM)
    assert read_folder(path) == committed(hub, RENAMED_TO)


def test_information_agrees_with_the_files(hub):
    info = HfApi().model_info("meta-llama/Llama-2-7b-hf", files_metadata=True)
    files = hub.content.repo("meta-llama/Llama-2-7b-hf").resolve().files

    assert {s.rfilename: (s.size, s.blob_id) for s in info.siblings} == {
        f.path: (f.size, f.oid) for f in files.values()
    }
    shard = next(s for s in info.siblings if s.rfilename == "model-00001-of-00002.safetensors")
    assert shard.lfs.sha256 == files[shard.rfilename].sha256
    assert info.card_data.license == "apache-2.0"
    assert info.gated is False


def test_trees_refs_paths_and_history(hub):
    api = HfApi()
    files = hub.content.repo("acme/parquet", repo_type="dataset").resolve().files
    top = list(api.list_repo_tree("acme/parquet", repo_type="dataset"))
    assert [e.path for e in top] == ["data"]
    inside = list(api.list_repo_tree("acme/parquet", "data", repo_type="dataset", expand=True))
    assert [e.path for e in inside] == sorted(files)
    assert all(e.lfs.sha256 == files[e.path].sha256 and e.last_commit is not None for e in inside)

    found = api.get_paths_info(TAGGED_ID, ["config.json", "no-such-file"])
    assert [f.path for f in found] == ["config.json"]
    refs = api.list_repo_refs(PULL_REQUEST_ID, include_pull_requests=True)
    assert [p.ref for p in refs.pull_requests] == ["refs/pr/42"]
    assert {b.name for b in api.list_repo_refs(TAGGED_ID).branches} == {"main", "dev"}
    assert [c.title for c in api.list_repo_commits(TAGGED_ID)] == ["revise the README", "initial commit"]


def test_long_trees_come_in_pages(start_hub):
    names = [f"part-{i:03d}.txt" for i in range(25)]
    hub = start_hub(HubContent(), page_size=10)
    hub.content.add("x/many", {name: name.encode() for name in names})

    assert [e.path for e in HfApi().list_repo_tree("x/many")] == names
    assert hub.log.count("GET", "*/tree/main") == 3
    path = huggingface_hub.snapshot_download("x/many", allow_patterns="*-01?.txt")
    assert sorted(read_folder(path)) == names[10:20]


def test_a_moved_branch_gives_the_new_commit_and_sends_only_what_changed(start_hub):
    hub = start_hub(HubContent())
    repo = hub.content.add("x/y", {"a.txt": b"old", "weights.bin": bytes(5000)})
    huggingface_hub.snapshot_download("x/y")
    moved = repo.commit({"a.txt": b"new"})

    with hub.log.new() as log:
        path = Path(huggingface_hub.snapshot_download("x/y"))
    assert path.name == moved
    assert (path / "a.txt").read_bytes() == b"new"
    assert log.file_bytes() == len(b"new")


def test_missing_things_are_told_apart(hub):
    with pytest.raises(RepositoryNotFoundError):
        huggingface_hub.snapshot_download("nobody/nothing")
    with pytest.raises(RepositoryNotFoundError):
        HfApi(token="hf_reader").model_info("nobody/nothing")
    with pytest.raises(RepositoryNotFoundError):  # a dataset of a model's name
        HfApi().dataset_info("gpt2")
    with pytest.raises(RevisionNotFoundError):
        huggingface_hub.snapshot_download("gpt2", revision="no-such-branch")
    with pytest.raises(RevisionNotFoundError):
        huggingface_hub.hf_hub_download("gpt2", "config.json", revision="0" * 40)
    with pytest.raises(RemoteEntryNotFoundError):
        huggingface_hub.hf_hub_download("gpt2", "no-such-file.json")
    with pytest.raises(RemoteEntryNotFoundError):
        list(HfApi().list_repo_tree("gpt2", "no-such-folder"))
