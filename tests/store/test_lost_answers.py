"""An answer that gets lost on the way does not make a winner think that it lost, nor two win."""

import pytest
from s3_proxy import S3Proxy

from metaflow_hf.store import open_store


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
