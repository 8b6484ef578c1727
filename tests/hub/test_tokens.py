"""A token is shown nowhere, whatever else is wrong with what was written."""

import logging
import pickle

import metaflow
import pytest

from metaflow_extensions.hf.failures import Failure
from metaflow_hf.errors import HubUnavailable, SelectionError
from metaflow_hf.hub.loadspec import parse_snapshots
from metaflow_hf.hub.retries import tell_retries

assert metaflow  # its extensions are imported by it, never before


@pytest.mark.parametrize(
    "load",
    [
        {"repo": "acme/model", "token": "hf_secret"},
        {"base": "acme/model", "headers": {"Authorization": "Bearer hf_secret"}},
        [("acme/model", "path", {"token": "hf_secret"})],
        {"base": {"repo": "acme/model", "token": "hf_secret"}},
        [{"repo": "acme/model", "token": "hf_secret"}],
        {"repo_id": "acme/model", "token": "hf_secret", "path": 3},
        {"repo_id": "acme/model", "token": "hf_secret", "local_dir": "x"},
    ],
)
def test_a_wrong_form_of_load_shows_no_token(load):
    with pytest.raises(SelectionError) as caught:
        parse_snapshots(load)
    assert "hf_secret" not in str(caught.value)


def test_aliases_still_name_repositories():
    entries = parse_snapshots({"repo": "acme/model", "path": "acme/other"})
    assert [(entry.name, entry.repo_id) for entry in entries] == [
        ("repo", "acme/model"),
        ("path", "acme/other"),
    ]


def test_a_retry_says_why_without_the_signature_of_the_address(caplog):
    tell_retries()
    extra = {
        "stamina.caused_by": "503 for url 'https://cdn/x?Signature=secret&Expires=1'",
        "stamina.retry_num": 1,
    }
    logging.getLogger("stamina").warning("stamina.retry_scheduled", extra=extra)
    assert "secret" not in caplog.text
    assert "503 for url 'https://cdn/x?…'" in caplog.text


def test_a_failure_keeps_its_headline_in_another_process():
    failure = pickle.loads(pickle.dumps(Failure(HubUnavailable("the hub is away"))))
    assert (failure.headline, str(failure)) == ("HubUnavailable", "the hub is away")
