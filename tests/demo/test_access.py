"""Who may see, who may download, and what those hear who may not."""

import huggingface_hub
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from metaflow_hf.demo.catalog import MODEL_ID, demo_content
from metaflow_hf_cli.fixtures import GATED_ID, OWNER, PRIVATE_ID, READER, STRANGER


def test_a_gated_repository_tells_its_files_to_anyone_but_gives_none(hub):
    commit = hub.content.repo(GATED_ID).resolve().sha
    for token, status in ((False, 401), (STRANGER, 403)):
        api = HfApi(token=token)
        assert api.model_info(GATED_ID).gated == "manual"
        assert "config.json" in api.list_repo_files(GATED_ID)
        for refused in (
            lambda api=api: api.auth_check(GATED_ID),
            lambda token=token: huggingface_hub.hf_hub_download(GATED_ID, "config.json", token=token),
            lambda token=token: huggingface_hub.snapshot_download(GATED_ID, revision=commit, token=token),
        ):
            with pytest.raises(GatedRepoError) as caught:
                refused()
            assert caught.value.response.status_code == status


def test_who_was_granted_access_downloads(hub):
    HfApi(token=READER).auth_check(GATED_ID)
    assert huggingface_hub.snapshot_download(GATED_ID, token=READER)


def test_a_private_repository_does_not_exist_for_others(hub):
    for token, status in ((False, 401), (STRANGER, 404)):
        api = HfApi(token=token)
        for ask in (api.model_info, api.list_repo_files, api.auth_check):
            with pytest.raises(RepositoryNotFoundError) as caught:
                ask(PRIVATE_ID)
            assert caught.value.response.status_code == status
        assert PRIVATE_ID not in {m.id for m in api.list_models()}
    assert HfApi(token=OWNER).model_info(PRIVATE_ID).private
    assert PRIVATE_ID in {m.id for m in HfApi(token=OWNER).list_models()}


def test_an_open_repository_passes_the_check(hub):
    with hub.log.new() as log:
        HfApi(token=False).auth_check("gpt2")
        HfApi(token=False).auth_check("imdb", repo_type="dataset")
    assert log.count("GET", "*/auth-check") >= 2


def test_an_unknown_token_is_refused_everywhere(hub):
    with pytest.raises(HfHubHTTPError) as caught:
        HfApi(token="hf_mistyped").model_info("gpt2")
    assert caught.value.response.status_code == 401
    assert not isinstance(caught.value, RepositoryNotFoundError)


def test_the_embedded_hub_ignores_a_token_of_the_real_one(start_hub):
    hub = start_hub(demo_content())
    HfApi(token="hf_of_the_real_hub").auth_check(MODEL_ID)
    assert hub.log.entries()[0].has_token


def test_who_am_i(hub):
    me = HfApi().whoami(token=OWNER)
    assert me["name"] == "owner"
    assert [o["name"] for o in me["orgs"]] == ["acme"]
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi().whoami(token="hf_mistyped")
