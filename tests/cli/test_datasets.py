"""``metaflow hf datasets``: search by what training can use, download whatever it is."""

import json
import re
from pathlib import Path

import pytest
from metaflow._vendor.click.testing import CliRunner

from metaflow_hf.demo.content import HubContent
from metaflow_hf.errors import SelectionError
from metaflow_hf.hub import search_datasets
from metaflow_hf.store import datastore
from metaflow_hf_cli.group import hf

# The table of what training can do with each modality, as people were promised it.
SUPPORT = {
    "text": "full",
    "document": "text extraction needed",
    **dict.fromkeys(
        ("audio", "image", "video", "tabular", "geospatial", "timeseries", "3d"), "browse and download only"
    ),
}


@pytest.fixture(autouse=True)
def project(start_hub, tmp_path: Path, monkeypatch):
    directory = tmp_path / "project"
    directory.mkdir()
    monkeypatch.chdir(directory)
    monkeypatch.setattr(datastore, "_active", ("local", str(directory / ".metaflow")))
    content = HubContent()
    for modality in SUPPORT:
        content.add(
            f"acme/{modality}-data",
            lambda modality=modality: {f"0.{modality}": modality.encode()},
            repo_type="dataset",
            tags=(f"modality:{modality}", "language:fr", "size_categories:1K<n<10K"),
        )
    tags = ("modality:text", "modality:image", "language:en", "size_categories:n<1K")
    content.add("other/captions", lambda: {"a.jsonl": b"{}"}, repo_type="dataset", tags=tags)
    return start_hub(content)


def call(*arguments: str, status: int = 0) -> str:
    done = CliRunner().invoke(hf, ["datasets", *arguments])
    assert done.exit_code == status, done.output
    return done.output


def names(*arguments: str) -> set[str]:
    return {found["repo_id"] for found in json.loads(call("search", *arguments, "--json"))}


def test_what_training_can_do_with_each_modality():
    assert json.loads(call("modalities", "--json")) == SUPPORT
    table = call("modalities").splitlines()
    assert len(table) == 1 + len(SUPPORT)
    assert ["document", "modality:document", "text extraction needed"] in [
        re.split("  +", row) for row in table
    ]
    found = {d.repo_id: d.training for d in search_datasets(limit=None)}
    assert found == {f"acme/{name}-data": support for name, support in SUPPORT.items()} | {
        "other/captions": "full"
    }


def test_search_by_modality_author_language_and_size():
    assert names("--modality", "text") == {"acme/text-data", "other/captions"}
    assert names("--modality", "image", "--author", "acme") == {"acme/image-data"}
    assert names("--language", "en") == {"other/captions"}
    assert names("--size", "1K") == {"other/captions"}
    assert names("--size", "1K-10K", "--modality", "audio", "--language", "fr") == {"acme/audio-data"}
    assert names("--query", "capt") == names("capt") == {"other/captions"}
    for option, value in (("--size", "huge"), ("--modality", "smell"), ("--sort", "beauty")):
        text = call("search", option, value, status=1)
        assert (
            f"SelectionError: {'sort=' if option == '--sort' else option[2:] + ' '}'{value}' is none of"
            in text
        )
        assert len(text.splitlines()) == 1
    with pytest.raises(SelectionError, match="1K-10K"):
        search_datasets(size="10")


@pytest.mark.parametrize("modality", SUPPORT)
def test_any_modality_is_downloaded(modality):
    done = CliRunner(mix_stderr=False).invoke(
        hf, ["datasets", "download", f"acme/{modality}-data", "--to", "here", "--json"]
    )
    assert done.exit_code == 0, done.stderr
    assert (Path(json.loads(done.stdout)["path"]) / f"0.{modality}").read_text() == modality
