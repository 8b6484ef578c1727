"""References survive JSON, and say what is wrong with what is not one."""

import json

import pytest

from metaflow_hf import CheckpointRef, ModelRef, SelectionError, SnapshotRef
from metaflow_hf.references import parse_reference

COMMON = {
    "key": "a/b.json",
    "digest": "0" * 64,
    "size": 10,
    "num_files": 2,
    "created_on": "2026-01-01T00:00:00Z",
}
REFERENCES = [
    SnapshotRef(**COMMON, repo_id="gpt2", repo_type="model", revision="main", commit_hash="1" * 40),
    ModelRef(**COMMON, label="best", pathspec="F/1/s/2", metadata={"loss": 1.5}),
    CheckpointRef(**COMMON, name="my.checkpoint", version=3),
]


@pytest.mark.parametrize("reference", REFERENCES, ids=lambda reference: reference.TYPE)
def test_json_and_back(reference):
    wire = json.loads(json.dumps(reference.to_json()))
    assert wire["type"] == reference.TYPE
    assert wire["key"] == "a/b.json"
    assert parse_reference(wire) == reference


def test_fields_of_a_later_minor_version_are_ignored():
    wire = {**REFERENCES[0].to_json(), "licence": "mit"}
    assert parse_reference(wire) == REFERENCES[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"type": "tape"}, "not a reference: type 'tape'"),
        ({"type": None}, "type None"),
        ({"schema": 2}, "upgrade metaflow-hf"),
    ],
)
def test_what_is_not_a_reference_says_why(change, said):
    with pytest.raises(SelectionError, match=said):
        parse_reference({**REFERENCES[0].to_json(), **change})


def test_a_missing_field_is_named():
    wire = REFERENCES[1].to_json()
    del wire["digest"]
    with pytest.raises(SelectionError, match="digest"):
        parse_reference(wire)


def test_another_type_than_wanted_is_refused():
    with pytest.raises(SelectionError, match="'model', got type 'snapshot'"):
        ModelRef.from_json(REFERENCES[0].to_json())
