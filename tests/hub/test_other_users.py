"""What one user cached of a restricted repository is not another's, by whatever door: token, scope, commit, resume."""

import pytest

from metaflow_hf import errors
from metaflow_hf.errors import HubUnavailable


@pytest.fixture
def commit_hash(own_hub, snapshots, request_for) -> str:
    """A gated repository that a friend cached in every scope."""
    for options in (
        {"run": "1"},
        {"run": "1", "scope": "flow"},
        {"run": "1", "scope": "global"},
        {"run": None},
    ):
        reference = snapshots(**options).ensure(request_for("acme/gated", token="hf_friend"))
    return reference.commit_hash


DOORS = [
    {"run": "2"},
    {"run": "2", "scope": "flow"},
    {"run": "2", "scope": "global"},
    {"run": None},
    {"run": "2", "origin_run": "1"},
]


@pytest.mark.parametrize("door", DOORS, ids=str)
@pytest.mark.parametrize("by_hash", [False, True])
def test_without_access_the_cache_gives_nothing(snapshots, request_for, commit_hash, door, by_hash):
    revision = commit_hash if by_hash else "main"
    for token in (False, "hf_owner_of_nothing"):
        with pytest.raises(errors.GatedRepoError):
            snapshots(**door).ensure(request_for("acme/gated", revision=revision, token=token))


@pytest.mark.parametrize("door", DOORS, ids=str)
@pytest.mark.parametrize("by_hash", [False, True])
def test_a_token_that_the_hub_refuses_opens_nothing(
    own_hub, snapshots, request_for, commit_hash, door, by_hash
):
    """An answer that says no is not an outage, for which the record would do."""
    own_hub.content.reject_unknown_tokens = True
    revision = commit_hash if by_hash else "main"
    with pytest.raises(HubUnavailable, match=r"refused the request \(401\).*HF_TOKEN"):
        snapshots(**door).ensure(request_for("acme/gated", revision=revision, token="hf_revoked"))


def test_an_open_repository_goes_on_with_its_record(own_hub, snapshots, request_for):
    """A proxy that refuses everything harms nobody who may read it anyway."""
    snapshots(run="1").ensure(request_for())
    own_hub.content.reject_unknown_tokens = True
    assert snapshots(run="2").ensure(request_for(token="hf_revoked")).num_files == 7


@pytest.mark.parametrize("token", ["hf_friend", None])
def test_a_resumed_run_checks_who_resumes_it(own_hub, snapshots, request_for, commit_hash, token):
    own_hub.content.repo("acme/gated").commit({"config.json": b'{"moved": 1}'})
    resumed = snapshots(run="2", origin_run="1")
    if token is None:
        with pytest.raises(errors.GatedRepoError):
            resumed.ensure(request_for("acme/gated", token=token))
        return
    # At the commit of the run that is resumed, although the branch has moved.
    assert resumed.ensure(request_for("acme/gated", token=token)).commit_hash == commit_hash
    with own_hub.log.new() as log:
        assert (
            snapshots(run="2", origin_run="1").resolve(request_for("acme/gated")).commit_hash == commit_hash
        )
    assert len(log) == 0
