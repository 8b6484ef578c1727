"""The datasets library, unchanged, against the hub: each file format, streamed and whole."""

import huggingface_hub
import pytest

from metaflow_hf.demo.catalog import DATASET_ID
from metaflow_hf_cli.fixtures import datasets as fixtures
from metaflow_hf_cli.fixtures import fixture_content

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def _quiet(hub):
    datasets.disable_progress_bars()


def stream(repo_id: str, *args, split: str = "train", **kwargs) -> list[dict]:
    return list(datasets.load_dataset(repo_id, *args, split=split, streaming=True, **kwargs))


def test_the_default_dataset_streams_with_features_and_splits(hub):
    splits = datasets.load_dataset(DATASET_ID, streaming=True)
    assert set(splits) == {"train", "test"}
    assert set(splits["train"].features) == {"text", "source"}
    assert len(stream(DATASET_ID)) > 1000


@pytest.mark.parametrize(
    ("repo_id", "seed"),
    [(fixtures.PARQUET_ID, 1), (fixtures.GZIP_ID, 2), (fixtures.CSV_ID, 3)],
)
def test_each_format_gives_its_rows_in_order(hub, repo_id, seed):
    assert stream(repo_id) == fixtures.rows(seed)


def test_plain_text_gives_its_lines(hub):
    assert [row["text"] for row in stream(fixtures.PLAIN_TEXT_ID)] == [
        row["text"] for row in fixtures.rows(4)
    ]


def test_configurations_and_splits_are_told_apart(hub):
    assert stream(fixtures.CONFIGS_ID) == fixtures.rows(6)
    assert stream(fixtures.CONFIGS_ID, "french") == fixtures.rows(7, 60)
    assert stream(fixtures.CONFIGS_ID, "english", split="validation") == fixtures.rows(106, 30)


def test_a_whole_download_equals_the_stream(hub):
    whole = datasets.load_dataset(fixtures.PARQUET_ID, split="train")
    assert list(whole) == stream(fixtures.PARQUET_ID)


def test_a_name_of_one_part_leads_to_its_owner(hub):
    """By information only: datasets itself cannot open a name of one part."""
    rows = stream(huggingface_hub.HfApi().dataset_info(fixtures.ONE_PART_ID).id)
    assert [row["text"] for row in rows] == [row["text"] for row in fixtures.rows(9)]


def test_a_commit_is_a_revision(start_hub):
    hub = start_hub(fixture_content())
    repo = hub.content.repo(fixtures.CSV_ID, repo_type="dataset")
    before = repo.resolve().sha
    repo.commit({"train.csv": b"id,text\n1,other\n"})
    assert stream(fixtures.CSV_ID, revision=before) == fixtures.rows(3)
    assert stream(fixtures.CSV_ID) == [{"id": 1, "text": "other"}]


def test_messages_and_blank_rows_arrive_as_they_are(hub):
    chat = stream(fixtures.CHAT_ID)
    assert [m["role"] for m in chat[0]["messages"]] == ["user", "assistant"]
    mixed = stream(fixtures.BLANK_ROWS_ID)
    assert len(mixed) == fixtures.NUM_ROWS
    assert sum(row["text"] is None for row in mixed) == 22
    assert any(row["text"] == " " for row in mixed)


def test_a_gated_dataset_needs_a_granted_token(hub):
    with pytest.raises(datasets.exceptions.DatasetNotFoundError, match="gated"):
        stream(fixtures.GATED_DATASET_ID)
    assert stream(fixtures.GATED_DATASET_ID, token="hf_owner") == fixtures.rows(2)


def test_an_outage_shorter_than_the_clients_patience_loses_no_row(hub):
    hub.faults.fail_next(2, status=503, path="*train-00001*")
    assert stream(fixtures.PARQUET_ID) == fixtures.rows(1)
