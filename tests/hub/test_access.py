"""Who may read what: each run's own token decides, whatever the cache holds."""

import pytest
from huggingface_hub import errors as hf_errors

from metaflow_hf import errors
from metaflow_hf.errors import HubUnavailable


def test_gated_files_need_a_token_that_was_granted_access(own_hub, snapshots, request_for):
    with pytest.raises(errors.GatedRepoError, match="HF_TOKEN"):
        snapshots().ensure(request_for("acme/gated"))
    assert snapshots().ensure(request_for("acme/gated", token="hf_friend")).num_files == 2


def test_what_one_user_cached_is_not_handed_to_another(own_hub, snapshots, request_for):
    reference = snapshots(run="1").ensure(request_for("acme/gated", token="hf_friend"))
    for revision in ("main", reference.commit_hash):
        with pytest.raises(errors.GatedRepoError):
            snapshots(run="2").ensure(request_for("acme/gated", revision=revision))
    with pytest.raises(errors.RepositoryNotFoundError):
        snapshots(run="2").ensure(request_for("acme/private", token="hf_friend"))


def test_the_token_of_the_environment_is_used(own_hub, snapshots, request_for, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_owner")
    assert snapshots().ensure(request_for("acme/private")).num_files == 1


def test_offline_restricted_content_is_given_only_where_it_is_in_scope(
    own_hub, snapshots, request_for, monkeypatch
):
    snapshots(run="1").ensure(request_for("acme/gated", token="hf_friend"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert snapshots(run="2").ensure(request_for("acme/gated")).num_files == 2
    with pytest.raises(HubUnavailable, match="private or gated"):
        snapshots(run="3", namespace="user:other").ensure(request_for("acme/gated"))


def test_no_token_is_stored_anywhere(own_hub, snapshots, request_for, store, cache):
    snapshots().ensure(request_for("acme/gated", token="hf_friend"))
    for info in store.list():
        assert b"hf_friend" not in store.get(info.key), info.key
    assert not any("hf_friend" in str(path) for path in cache.root.rglob("*"))
    assert "hf_friend" not in repr(request_for("acme/gated", token="hf_friend"))


@pytest.mark.parametrize(
    ("arguments", "ours", "theirs", "words"),
    [
        (
            {"repo_id": "no/such"},
            errors.RepositoryNotFoundError,
            hf_errors.RepositoryNotFoundError,
            "no/such",
        ),
        (
            {"repo_id": "acme/model", "revision": "v9"},
            errors.RevisionNotFoundError,
            hf_errors.RevisionNotFoundError,
            "'v9'",
        ),
        ({"repo_id": "acme/gated"}, errors.GatedRepoError, hf_errors.GatedRepoError, "gated"),
        (
            {"repo_id": "acme/model", "filename": "no.json"},
            errors.EntryNotFoundError,
            hf_errors.EntryNotFoundError,
            "no.json",
        ),
    ],
)
def test_errors_are_of_both_families_and_one_line(
    own_hub, snapshots, request_for, arguments, ours, theirs, words
):
    with pytest.raises(theirs) as caught:
        snapshots().ensure(request_for(**arguments))
    error = caught.value
    assert isinstance(error, ours)
    assert isinstance(error, errors.MetaflowHFError)
    assert words in str(error)
    assert "\n" not in str(error)
    assert own_hub.url in str(error)


def test_an_unknown_revision_is_an_error_even_when_others_are_cached(own_hub, snapshots, request_for):
    snapshots().ensure(request_for())
    with pytest.raises(errors.RevisionNotFoundError):
        snapshots().ensure(request_for(revision="v9"))
