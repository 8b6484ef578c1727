"""Searching models and datasets by tags, words and owners, page by page."""

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import BadRequestError

from metaflow_hf.demo.content import HubContent


def ids(found) -> list[str]:
    return [item.id for item in found]


def test_a_modality_selects_its_datasets(hub):
    assert set(ids(HfApi().list_datasets(filter="modality:image"))) == {"acme/photos", "acme/drawings"}
    texts = ids(HfApi().list_datasets(filter="modality:text"))
    assert "metaflow-hf/python-docs" in texts
    assert "acme/photos" not in texts


def test_all_conditions_must_hold(hub):
    assert ids(HfApi().list_datasets(filter=["modality:text", "format:csv"])) == ["acme/csv"]
    assert ids(HfApi().list_datasets(search="LETTERS")) == ["acme/scanned-letters"]
    assert ids(HfApi().list_models(author="meta-llama", search="70b")) == ["meta-llama/Llama-2-70b-hf"]
    assert ids(HfApi().list_models(filter="llama", author="bigcode")) == []
    assert ids(HfApi().list_models(gated=True)) == ["acme/gated-model"]


def test_the_most_downloaded_come_first_and_limit_cuts(hub):
    assert ids(HfApi().list_models(sort="downloads", limit=2)) == ["bert-base-uncased", "gpt2"]
    (entry,) = hub.log.entries("GET", "/api/models")
    assert "limit=2" in entry.query


def test_searching_builds_no_repository(start_hub):
    content = HubContent()
    content.add(
        "x/never-built", lambda: pytest.fail("was built"), repo_type="dataset", tags=["modality:text"]
    )
    start_hub(content)
    assert ids(HfApi().list_datasets(filter="modality:text")) == ["x/never-built"]


def test_long_results_come_in_pages_and_a_limit_stops_early(start_hub):
    content = HubContent()
    for i in range(25):
        content.add(f"x/d{i:02d}", {}, repo_type="dataset", tags=["modality:text"], downloads=100 - i)
    hub = start_hub(content, page_size=10)

    assert ids(HfApi().list_datasets(filter="modality:text")) == [f"x/d{i:02d}" for i in range(25)]
    assert hub.log.count("GET", "/api/datasets") == 3
    with hub.log.new() as log:
        assert ids(HfApi().list_datasets(filter="modality:text", limit=12)) == [
            f"x/d{i:02d}" for i in range(12)
        ]
    assert log.count("GET", "/api/datasets") == 2


def test_an_unknown_order_is_refused(hub):
    with pytest.raises(BadRequestError, match="sort"):
        ids(HfApi().list_models(sort="beauty"))
