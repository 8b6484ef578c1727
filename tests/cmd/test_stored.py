"""``metaflow hf snapshots | models | du | gc``: the commands in this process, and once as people call them."""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from metaflow._vendor.click.testing import CliRunner

from metaflow_extensions.hf.cmd.group import hf
from metaflow_hf.store import configured_store, datastore
from metaflow_hf.store.collection import collect
from metaflow_hf.store.models import save_directory


@pytest.fixture(autouse=True)
def project(hub, tmp_path: Path, monkeypatch) -> Path:
    directory = tmp_path / "project"
    directory.mkdir()
    monkeypatch.chdir(directory)
    monkeypatch.setattr(datastore, "_active", ("local", str(directory / ".metaflow")))
    return directory


def call(*arguments: str, status: int = 0) -> str:
    done = CliRunner().invoke(hf, [str(argument) for argument in arguments])
    assert done.exit_code == status, done.output
    assert "Traceback" not in done.output
    return done.output


def call_json(*arguments: str, status: int = 0):
    text = call(*arguments, "--json", status=status)
    return json.loads(text[min(i for i in (text.find("{"), text.find("[")) if i >= 0) :])


def test_snapshots_from_get_to_rm(hub, project: Path):
    plan = call("snapshots", "get", "gpt2", "--allow", "*.json", "--dry-run")
    assert "config.json" in plan
    assert plan.splitlines()[-1].endswith("to download")
    assert call("snapshots", "ls") == "no snapshots are stored\n"
    assert {item["path"] for item in call_json("snapshots", "get", "gpt2", "--dry-run")} >= {"config.json"}

    lines = call("snapshots", "get", "gpt2", "--allow", "*.json", "--to", "here").splitlines()
    assert lines[-1] == "here"
    assert "Downloaded gpt2@" in lines[0]
    assert Path("here/config.json").exists()
    call("snapshots", "get", "gpt2", "--revision", "v1.0", "--ignore", "*.safetensors")

    commit = hub.content.repo("gpt2").resolve().sha
    table = call("snapshots", "ls")
    assert table.splitlines()[1].split()[:2] == ["gpt2", "model"]
    [repo] = call_json("snapshots", "ls")["repos"]
    assert [revision["commit_hash"] for revision in repo["revisions"]].count(commit) == 1
    assert commit in call("snapshots", "show", "gpt2")
    assert len(call_json("snapshots", "show", "gpt2")[0]["revisions"]) == 2

    assert "forgot 1 revisions" in call("snapshots", "rm", "gpt2", "--revision", commit[:8])
    assert commit not in call("snapshots", "show", "gpt2")
    assert call_json("snapshots", "rm", "gpt2")["expected_freed_size"] > 0
    assert call("snapshots", "ls") == "no snapshots are stored\n"


def test_verify_names_what_is_damaged():
    call("snapshots", "get", "gpt2")
    assert call_json("snapshots", "verify")["problems"] == []
    store = configured_store()
    [repo] = call_json("snapshots", "ls")["repos"]
    file = call_json("models", "show", repo["revisions"][0]["keys"][0])["files"][0]
    store.put(file["blob"], b"x" * file["size"])
    text = call("snapshots", "verify", "gpt2", status=1)
    assert f": {file['path']}: " in text
    assert text.splitlines()[-1].endswith("blobs read, 1 files damaged")
    store.delete(file["blob"])
    assert call_json("snapshots", "verify", status=1)["problems"][0]["path"] == file["path"]
    call("snapshots", "get", "gpt2", "--force")
    assert call_json("snapshots", "verify")["problems"] == []


def test_models_from_ls_to_gc(project: Path):
    assert call("models", "ls") == "no models are stored\n"
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    store = configured_store()
    reference = save_directory(
        store, "model", flow="F", run="1", step="s", task="2", label="best", metadata={"loss": 1.5}
    )
    assert reference.key in call("models", "ls", "--flow", "F")
    assert call_json("models", "ls", "--flow", "Other") == []
    [model] = call_json("models", "ls")
    assert (model["label"], model["pathspec"], model["metadata"]) == ("best", "F/1/s/2", {"loss": 1.5})
    assert "loss" in call("models", "show", reference.key)
    assert call("models", "get", reference.key, "out") == "out\n"
    assert Path("out/config.json").read_text() == "{}"
    assert call_json("models", "rm", reference.key) == {"key": reference.key}
    assert "NotFound: nothing is stored" in call("models", "get", reference.key, "out", status=1)

    usage = {item["name"]: item["size"] for item in call_json("du")["usage"]}
    assert usage["blobs"] == usage["blobs that nothing refers to"] == 2
    assert "this machine's cache" in call("du")
    # Young bytes may belong to an upload under way.
    assert call_json("gc")["condemned"]["blobs"] == 0
    collect(store, now=lambda: datetime.now(UTC) + timedelta(days=2))
    assert "1 blobs, 2 B: noted earlier, waiting" in call("gc", "--dry-run")
    assert "SelectionError: keep_days=3.0 is too few" in call("gc", "--keep-days", "3", status=1)


def test_datasets_are_found_and_downloaded_whatever_their_modality():
    table = call("datasets", "search", "--modality", "document").splitlines()
    assert "text extraction needed" in table[1]
    found = call_json("datasets", "search", "--modality", "text", "--limit", "3")
    assert [dataset["training"] for dataset in found] == ["full"] * 3
    assert call("datasets", "search", "--query", "nothing-like-this") == "no dataset was found\n"
    assert "SelectionError: modality 'smell'" in call("datasets", "search", "--modality", "smell", status=1)
    path = call_json("datasets", "download", "acme/photos", "--to", "photos")["path"]
    assert any(Path(path).iterdir())


def test_a_model_is_pushed_from_the_shell(start_hub, monkeypatch):
    from metaflow_hf.demo.fixtures import OWNER, fixture_content

    own_hub = start_hub(fixture_content())
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    reference = save_directory(configured_store(), "model", flow="F", run="1", step="s", task="2")
    assert "token that may write there" in call("models", "push", "model", "acme/mine", status=1)
    monkeypatch.setenv("HF_TOKEN", OWNER)
    pushed = call_json("models", "push", reference.key, "acme/mine", "--private")
    assert own_hub.content.repo("acme/mine").resolve().sha == pushed["commit_hash"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("snapshots", "get", "no/such"), "RepositoryNotFoundError: model 'no/such'"),
        (("snapshots", "get", "../etc"), "SelectionError: '../etc' is not the id"),
        (("snapshots", "show", "gpt2"), "no snapshot of model 'gpt2' is stored"),
        (("models", "show", "models/none/such/x/y/z.json"), "NotFound: nothing is stored"),
        (("models", "rm", "blobs/ab/abc"), "is not the key of"),
    ],
)
def test_what_goes_wrong_is_one_line(arguments, words):
    text = call(*arguments, status=1)
    assert words in text
    assert len(text.strip().splitlines()) == 1


def test_the_commands_use_the_configured_datastore(subprocess_environment, project: Path):
    command = [sys.executable, "-c", "from metaflow.cmd.main_cli import start; start()", "hf", "snapshots"]
    environment = {**subprocess_environment, "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(project)}
    got = subprocess.run(
        [*command, "get", "gpt2", "--allow", "config.json"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    path = Path(got.stdout.strip().splitlines()[-1])
    assert os.listdir(path) == ["config.json"]
    assert call_json("snapshots", "ls")["repos"][0]["repo_id"] == "gpt2"
