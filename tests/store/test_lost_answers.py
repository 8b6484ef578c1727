"""An answer that gets lost on the way does not make a winner think that it lost, nor two win."""

import pytest
from s3_proxy import S3Proxy

from metaflow_hf.errors import StoreUnavailable
from metaflow_hf.store import obstore_backend, open_store


@pytest.mark.parametrize("lost", [1, 2])
def test_a_winner_whose_answer_was_lost_has_won(proxy: S3Proxy, s3_root: str, lost: int):
    store = open_store(s3_root)
    proxy.drop = lost
    outcome = store.create("claims/1", b"mine, with my nonce")
    assert outcome.created
    assert proxy.drop == 0
    assert proxy.count("PUT") > lost  # it was asked again
    assert store.get("claims/1") == b"mine, with my nonce"


def test_a_loser_whose_answer_was_lost_has_lost(proxy: S3Proxy, s3_root: str):
    store = open_store(s3_root)
    assert store.create("claims/1", b"theirs").created
    proxy.drop = 1
    outcome = store.create("claims/1", b"mine")
    assert (outcome.created, outcome.content) == (False, b"theirs")


def test_a_conflict_with_a_create_that_comes_to_nothing_is_not_lost(proxy: S3Proxy, s3_root: str):
    store = open_store(s3_root)
    proxy.conflicts = 2
    assert store.create("claims/1", b"mine").created
    proxy.conflicts = 1
    outcome = store.create("claims/1", b"theirs")
    assert (outcome.created, outcome.content) == (False, b"mine")


def test_conflicts_without_end_are_an_outage(proxy: S3Proxy, s3_root: str, monkeypatch):
    monkeypatch.setattr(obstore_backend, "_CONFLICT_PAUSES", (0.0, 0.0))
    proxy.conflicts = 9
    with pytest.raises(StoreUnavailable, match="others are creating it"):
        open_store(s3_root).create("claims/1", b"mine")
