"""The decorators in real runs."""

import re
from pathlib import Path

import pytest

FILES_OF_BERT = {
    ".gitattributes",
    "LICENSE",
    "README.md",
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
}


def contents(outcome) -> list[set[str]]:
    return [set(re.findall(r"'([^']+)'", line)) for line in outcome.lines("Contents:")]


def test_static_loads_download_once_for_two_runs(run_flow, hub, project: Path, subprocess_environment):
    first = run_flow("static_flow.py")
    assert first.status == 0, first.output
    json_files = {name for name in FILES_OF_BERT if name.endswith(".json")}
    assert contents(first) == [FILES_OF_BERT, FILES_OF_BERT, json_files]
    assert {path.name for path in (project / "model_directory").iterdir()} == FILES_OF_BERT
    said = first.lines("[@huggingface_hub] Loading model from datastore to", "Model being loaded: snapshots/")
    assert len(said) == 3
    assert "to ./model_directory. Model" in said[1]
    with hub.log.new() as log:
        second = run_flow("static_flow.py")
    assert second.status == 0, second.output
    # What was made for tasks is gone with them.
    assert list(Path(subprocess_environment["METAFLOW_HF_CACHE"], "work").iterdir()) == []
    assert contents(second) == contents(first)
    assert log.file_bytes() == 0


def test_a_reference_loads_in_a_later_step(run_flow, hub):
    first = run_flow("dynamic_flow.py")
    assert first.status == 0, first.output
    key = re.search(r"Model Reference saved with key : (\S+)", first.output)
    assert key is not None
    assert first.lines(
        f"[@model] Loading Artifact with name `hf_model_reference` [type:snapshot] with key: {key[1]}"
    )
    assert re.search(
        r"\[@model\] Loaded artifact `hf_model_reference\[type:snapshot\]` in \d+\.\d\d seconds", first.output
    )
    with hub.log.new() as log:
        second = run_flow("dynamic_flow.py")
    assert second.status == 0
    assert log.file_bytes() == 0


def test_every_form_of_load_save_and_join(run_flow, project: Path):
    (project / "mine.txt").write_text("mine")
    outcome = run_flow("forms_flow.py")
    assert outcome.status == 0, outcome.output
    assert outcome.lines("all forms work")
    assert outcome.lines("Loading model from datastore to ./. Model being loaded: ")
    # What was made below a root of the user's own is gone with its task.
    assert [list(root.iterdir()) for root in sorted((project / "roots").iterdir())] == [[], []]
    # What lies where a repository is loaded is neither touched nor stored.
    assert (project / "mine.txt").read_text() == "mine"
    blobs = (project / ".metaflow" / "mf.hf" / "blobs").glob("*/*")
    assert [blob for blob in blobs if blob.read_bytes() == b"mine"] == []
    assert len(outcome.lines("Artifact `reference_key` was not loaded")) == 2


@pytest.mark.parametrize(
    ("repo_id", "error", "words"),
    [
        ("no/such", "RepositoryNotFoundError", "model 'no/such' at revision 'main'"),
        ("../../etc", "SelectionError", "is not the id of a repository"),
    ],
)
def test_bad_input_is_one_clear_headline(run_flow, repo_id, error, words):
    outcome = run_flow("parameter_flow.py", "--repo_id", repo_id)
    assert outcome.status != 0
    assert len(outcome.lines(f" {error}:")) == 1
    headline = outcome.output.partition(f" {error}:\n")[2].splitlines()[0]
    assert words in headline
    assert "Traceback" not in outcome.output


def test_a_wrong_argument_is_told_before_anything_runs(run_flow, project: Path):
    flow = project / "wrong.py"
    flow.write_text(
        (Path(__file__).parent / "flows" / "static_flow.py").read_text().replace("bert-base", "bert base")
    )
    outcome = run_flow(flow)
    assert outcome.status != 0
    assert "Task is starting" not in outcome.output
    assert "Traceback" not in outcome.output
    assert outcome.lines("@huggingface_hub of step ", "'bert base-uncased' is not the id of a repository")


def test_a_missing_artifact_says_what_to_assign(run_flow, project: Path):
    flow = project / "missing.py"
    text = (Path(__file__).parent / "flows" / "dynamic_flow.py").read_text()
    flow.write_text(
        text.replace("self.hf_model_reference =", "ref =").replace("% self.hf_model_reference[", "% ref[")
    )
    outcome = run_flow(flow)
    assert outcome.status != 0
    assert outcome.lines("SelectionError:")
    assert outcome.lines("@model(load=…) names 'hf_model_reference'", "self.hf_model_reference = ")
    assert "Traceback" not in outcome.output


def test_tokens_are_used_and_stored_nowhere(run_flow, project: Path):
    outcome = run_flow("token_flow.py", HF_TOKEN="hf_owner")
    assert outcome.status == 0, outcome.output
    assert outcome.lines("files: ")
    assert outcome.lines("set HF_TOKEN")
    assert not outcome.lines("is installed too")
    stored = [path for path in (project / ".metaflow").rglob("*") if path.is_file()]
    for kind in ("mf.hf/blobs/", "mf.cards/", "_meta/", "TokenFlow/data/"):
        assert any(kind in path.as_posix() for path in stored), kind
    # The one written into load=, and that of the environment.
    for token in ("hf_reader", "hf_owner"):
        assert token not in outcome.output
        assert [path for path in stored if token.encode() in _unpacked(path)] == []


def _unpacked(path: Path) -> bytes:
    import gzip

    data = path.read_bytes()
    return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data


def test_the_embedded_hub_serves_where_it_is_asked_for(run_flow, hub):
    with hub.log.new() as log:
        outcome = run_flow(
            "parameter_flow.py", "--repo_id", "metaflow-hf/tiny-llama", METAFLOW_HF_HUB="embedded"
        )
    assert outcome.status == 0, outcome.output
    assert len(log) == 0


def test_hub_flow_needs_no_arguments(run_flow, hub):
    flow = Path(__file__).parents[2] / "flows" / "hub_flow.py"
    first = run_flow(flow, "--repo_id", "gpt2")
    assert first.status == 0, first.output
    assert first.lines("model.safetensors", "bytes")
    default = run_flow(flow)
    assert default.status == 0, default.output
    assert default.lines("metaflow-hf/tiny-llama at commit")
