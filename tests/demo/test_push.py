"""Writing to the hub with huggingface_hub: what was uploaded is what others download."""

import hashlib
import http.client
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import huggingface_hub
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError

from metaflow_hf_cli.fixtures import OWNER, READER, fixture_content

# huggingface_hub's own LFS upload passes data= to its HTTP client, which warns.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

FILES = {
    "README.md": b"---\nlicense: mit\n---\n# Mine\n",
    "config.json": b"{}",
    "empty.txt": b"",
    "deep/er/weights.safetensors": bytes(range(256)) * 40,
}


@pytest.fixture
def own_hub(start_hub):
    return start_hub(fixture_content())


@pytest.fixture
def folder(tmp_path) -> Path:
    for name, data in FILES.items():
        path = tmp_path / "mine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "mine"


@pytest.mark.parametrize("repo_type", ["model", "dataset"])
def test_an_uploaded_folder_comes_back_as_it_was(own_hub, folder, tmp_path, repo_type):
    api = HfApi(token=OWNER)
    api.create_repo("acme/mine", repo_type=repo_type)
    pushed = api.upload_folder(repo_id="acme/mine", folder_path=folder, repo_type=repo_type)

    back = Path(
        huggingface_hub.snapshot_download("acme/mine", repo_type=repo_type, local_dir=tmp_path / "back")
    )
    assert {name: (back / name).read_bytes() for name in FILES} == FILES
    assert pushed.oid == api.repo_info("acme/mine", repo_type=repo_type).sha


def test_what_the_hub_holds_is_not_uploaded_again(own_hub, folder):
    api = HfApi(token=OWNER)
    api.create_repo("acme/mine")
    first = api.upload_folder(repo_id="acme/mine", folder_path=folder)
    with own_hub.log.new() as log:
        second = api.upload_folder(repo_id="acme/mine", folder_path=folder)
    assert log.count("PUT") == 0
    assert second.oid == first.oid


def test_creating_twice_is_refused_unless_that_is_fine(own_hub):
    api = HfApi(token=OWNER)
    api.create_repo("acme/mine", private=True)
    assert api.create_repo("acme/mine", exist_ok=True).repo_id == "acme/mine"
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_repo("acme/mine")
    assert caught.value.response.status_code == 409
    assert api.model_info("acme/mine").private


def test_a_repository_without_owner_becomes_the_users(own_hub):
    assert HfApi(token=OWNER).create_repo("mine").repo_id == "owner/mine"


def test_only_the_owner_writes(own_hub, folder):
    for token, status in ((READER, 403), (False, 401)):
        with pytest.raises(HfHubHTTPError) as caught:
            HfApi(token=token).upload_folder(repo_id="acme/new-name", folder_path=folder)
        assert caught.value.response.status_code == status


def test_deletions_branches_tags_and_pull_requests(own_hub):
    api = HfApi(token=OWNER)
    repo = own_hub.content.repo("acme/new-name")
    before = repo.resolve().sha
    api.create_branch("acme/new-name", branch="side")
    api.create_tag("acme/new-name", tag="v1")
    operations = [CommitOperationDelete("vocab.json"), CommitOperationAdd("new.txt", b"new")]
    api.create_commit("acme/new-name", operations, commit_message="on a side branch", revision="side")
    proposed = api.create_commit(
        "acme/new-name", [CommitOperationAdd("p.txt", b"p")], commit_message="propose", create_pr=True
    )

    assert repo.resolve("main").sha == repo.resolve("v1").sha == before
    assert "vocab.json" not in repo.resolve("side").files
    assert repo.resolve("side").files["new.txt"].data == b"new"
    assert repo.resolve(proposed.pr_revision).files["p.txt"].data == b"p"


def test_a_commit_on_an_older_state_is_refused(own_hub):
    api = HfApi(token=OWNER)
    stale = api.model_info("acme/new-name").sha
    add = [CommitOperationAdd("a.txt", b"a")]
    api.create_commit("acme/new-name", add, commit_message="one", parent_commit=stale)
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_commit(
            "acme/new-name", [CommitOperationAdd("b.txt", b"b")], commit_message="two", parent_commit=stale
        )
    assert caught.value.response.status_code == 412


def test_deleting_what_is_not_there_is_refused(own_hub):
    with pytest.raises(RemoteEntryNotFoundError, match="doesn't exist"):
        HfApi(token=OWNER).create_commit(
            "acme/new-name", [CommitOperationDelete("no-such-file")], commit_message="delete"
        )


def test_a_broken_header_of_a_readme_is_refused(own_hub):
    with pytest.raises(ValueError, match="Invalid metadata"):
        HfApi(token=OWNER).upload_file(
            path_or_fileobj=b"---\nlicense: [mit\n---\n", path_in_repo="README.md", repo_id="acme/new-name"
        )


def test_a_body_may_come_in_chunks(own_hub):
    data = b"some bytes" * 1000
    sha256 = hashlib.sha256(data).hexdigest()
    with closing(http.client.HTTPConnection(urlsplit(own_hub.storage_url).netloc)) as storage:
        pieces = (data[i : i + 999] for i in range(0, len(data), 999))
        storage.request("PUT", f"/lfs/{sha256}", body=pieces, encode_chunked=True)
        assert storage.getresponse().read() == b""
        storage.request("GET", f"/lfs/{sha256}")
        assert storage.getresponse().read() == data


def test_content_that_does_not_have_its_hash_is_refused(own_hub):
    with closing(http.client.HTTPConnection(urlsplit(own_hub.storage_url).netloc)) as storage:
        storage.request("PUT", f"/lfs/{'0' * 64}", body=b"other bytes")
        assert storage.getresponse().status == 400
