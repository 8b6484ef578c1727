"""``metaflow hf snapshots | models | du | gc``: the commands in this process, and once as people call them."""

import json
import os
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from metaflow._vendor.click.testing import CliRunner

from metaflow_hf.hub.endpoint import Endpoint
from metaflow_hf.hub.names import Repo
from metaflow_hf.hub.records import Refs, Resolved
from metaflow_hf.store import configured_store, datastore
from metaflow_hf.store.collection import collect
from metaflow_hf.store.models import save_directory
from metaflow_hf_cli.group import hf
from metaflow_hf_cli.output import print_table

pytestmark = pytest.mark.usefixtures("project")


def call(*arguments: str, status: int = 0) -> str:
    done = CliRunner().invoke(hf, [str(argument) for argument in arguments])
    assert done.exit_code == status, done.output
    assert "Traceback" not in done.output
    return done.output


def call_json(*arguments: str, status: int = 0):
    """What a program reads: stdout holds one JSON document and nothing else."""
    done = CliRunner(mix_stderr=False).invoke(hf, [*map(str, arguments), "--json"])
    assert done.exit_code == status, done.stderr
    return json.loads(done.stdout)


def test_snapshots_from_get_to_rm(hub, project: Path):
    plan = call("snapshots", "get", "gpt2", "--allow", "*.json", "--dry-run")
    assert "config.json" in plan
    assert plan.splitlines()[-1].endswith(" to download, 0 B stored")
    assert call("snapshots", "ls") == "no snapshots are stored\n"
    assert {item["path"] for item in call_json("snapshots", "get", "gpt2", "--dry-run")} >= {"config.json"}

    lines = call("snapshots", "get", "gpt2", "--allow", "*.json", "--to", "here").splitlines()
    assert lines[-1] == "here"
    assert "Downloaded gpt2@" in lines[0]
    assert Path("here/config.json").exists()
    call("snapshots", "get", "gpt2", "--revision", "v1.0", "--ignore", "*.safetensors")

    commit = hub.content.repo("gpt2").resolve().sha
    table = call("snapshots", "ls")
    assert [table.splitlines()[1].split()[place] for place in (0, -1)] == ["model", "gpt2"]
    [repo] = call_json("snapshots", "ls")["repos"]
    assert [revision["commit_hash"] for revision in repo["revisions"]].count(commit) == 1
    assert commit in call("snapshots", "show", "gpt2")
    assert len(call_json("snapshots", "show", "gpt2")[0]["revisions"]) == 2

    assert "forgot 1 commit;" in call("snapshots", "rm", "gpt2", "--revision", commit[:8])
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
    assert re.search(r"noted earlier, waiting +1 +2 B", call("gc", "--dry-run"))
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
    from metaflow_hf_cli.fixtures import OWNER, fixture_content

    own_hub = start_hub(fixture_content())
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    reference = save_directory(configured_store(), "model", flow="F", run="1", step="s", task="2")
    assert "token that may write there" in call("models", "push", "model", "acme/mine", status=1)
    monkeypatch.setenv("HF_TOKEN", OWNER)
    pushed = call_json("models", "push", reference.key, "acme/mine", "--private")
    assert own_hub.content.repo("acme/mine").resolve().sha == pushed["commit_hash"]


def test_what_ls_prints_is_taken_by_every_other_command(hub, project: Path):
    call("snapshots", "get", "gpt2@v1.0", "--allow", "*.json")
    call("snapshots", "get", "gpt2", "--allow", "*.json")
    call("snapshots", "get", "gpt2", "--allow", "*.txt")
    call("snapshots", "get", "acme/photos", "--repo-type", "dataset", "--allow", "*.md")
    old, new = (hub.content.repo("gpt2").resolve(name).sha for name in ("v1.0", "main"))
    repos = {repo["repo_id"]: repo for repo in call_json("snapshots", "ls")["repos"]}
    assert {repo_id: repo["repo_type"] for repo_id, repo in repos.items()} == {
        "gpt2": "model",
        "acme/photos": "dataset",
    }
    for repo in repos.values():
        assert call_json("snapshots", "show", repo["repo_id"]) == [repo]
        assert call_json("snapshots", "verify", repo["repo_id"])["problems"] == []
        for revision in repo["revisions"]:
            target = f"{repo['repo_id']}@{revision['commit_hash'][:10]}"
            shown = call_json("snapshots", "show", target)
            assert [item["key"] for item in shown] == revision["keys"]
            for key in revision["keys"]:
                [one] = call_json("snapshots", "show", key)
                assert one in shown
                assert call_json("snapshots", "verify", key)["blobs"] == len(one["files"])
                call("snapshots", "get", key, "--to", f"out/{key}")
                assert Path("out", key, one["files"][0]["path"]).exists()
    # A branch or tag is what the hub last said it is.
    assert call_json("snapshots", "show", "gpt2@v1.0")[0]["about"]["commit_hash"] == old
    [first, second] = next(r["keys"] for r in repos["gpt2"]["revisions"] if r["commit_hash"] == new)
    assert call_json("snapshots", "rm", first) == {"key": first}
    assert [item["key"] for item in call_json("snapshots", "show", f"gpt2@{new}")] == [second]
    assert call_json("snapshots", "rm", "gpt2@main")["commits"] == [new]
    assert call_json("snapshots", "rm", "gpt2@v1.0")["commits"] == [old]
    assert call_json("snapshots", "rm", "acme/photos")["commits"]
    assert call("snapshots", "ls") == "no snapshots are stored\n"
    assert list(configured_store().list("snapshots")) == []


def test_rm_takes_no_commit_that_was_not_named(hub):
    old, new = (hub.content.repo("gpt2").resolve(name).sha for name in ("v1.0", "main"))
    for revision in (old, new):
        call("snapshots", "get", f"gpt2@{revision}", "--allow", "config.json")
    # A tag such as 1 may be how another commit begins.
    said = Resolved(old, restricted=False, resolved_on=datetime.now(UTC))
    Refs(configured_store()).add(Endpoint.of(), Repo.of("gpt2"), new[0], said)
    assert [item["about"]["commit_hash"] for item in call_json("snapshots", "show", f"gpt2@{new[0]}")] == [
        old
    ]
    # As a shell writes a variable that is not set.
    for arguments in (("gpt2@",), ("gpt2", "--revision", "")):
        assert "SelectionError: the revision of 'gpt2' is empty" in call(
            "snapshots", "rm", *arguments, status=1
        )
    assert call_json("snapshots", "rm", f"gpt2@{new[0]}")["commits"] == [old]
    [repo] = call_json("snapshots", "ls")["repos"]
    assert [revision["commit_hash"] for revision in repo["revisions"]] == [new]

    # Another commit that begins alike.
    twin = new[:6] + "".join(reversed(new[6:]))
    [key] = repo["revisions"][0]["keys"]
    manifest = json.loads(configured_store().get(key))
    manifest["about"]["commit_hash"] = twin
    configured_store().put(key.replace(new, twin), json.dumps(manifest).encode())
    text = call("snapshots", "rm", f"gpt2@{new[:6]}", status=1)
    assert "is the beginning of 2 commits of gpt2" in text
    assert new in text
    assert twin in text
    assert call_json("snapshots", "rm", f"gpt2@{new}")["commits"] == [new]


def test_a_damaged_manifest_is_named_and_can_be_removed_and_brought_again(hub):
    call("snapshots", "get", "gpt2", "--allow", "config.json")
    [key] = call_json("snapshots", "ls")["repos"][0]["revisions"][0]["keys"]
    configured_store().put(key, b"{")
    assert "IntegrityError: the manifest" in call("snapshots", "ls", status=1)
    text = call("snapshots", "verify", status=1)
    assert text.startswith(f"{key}: the manifest {key} is damaged")
    assert f"metaflow hf snapshots rm {key}" in text
    call("snapshots", "rm", key)
    call("snapshots", "get", "gpt2", "--allow", "config.json")
    assert call_json("snapshots", "verify")["problems"] == []


def test_gc_frees_exported_trainings_and_says_so():
    store = configured_store()
    for name in ("spec.json", "rounds/0.json", "exports/x.json"):
        store.create(f"training/mine/{name}", b"{}")
    store.create("training/mine/weights/0000000000/x/model.safetensors", b"x" * 2_000_000)
    store.create("training/kept/weights/0000000000/x/model.safetensors", b"x")
    [mine] = call_json("gc", "--dry-run")["training"]
    assert mine == {"lineage": "mine", "reason": "exported", "objects": 1, "bytes": 2_000_000}
    text = call("gc")
    assert [line.split() for line in text.splitlines()][-1] == [
        "exported",
        "training",
        "mine",
        "1",
        "2.0",
        "MB",
    ]
    assert [info.key for info in store.list("training")] == [
        "training/kept/weights/0000000000/x/model.safetensors",
        "training/mine/exports/x.json",
        "training/mine/rounds/0.json",
        "training/mine/spec.json",
    ]


def test_the_json_of_every_command_is_as_programs_know_it():
    """Fields may be added; none of these goes or changes its type."""
    store = configured_store()
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    model = save_directory(store, "model", flow="F", run="1", step="s", task="2").key
    got = call_json("snapshots", "get", "gpt2", "--allow", "config.json")
    commit, key = (
        got["reference"]["commit_hash"],
        f"manifests/{got['reference']['key'].partition('/global/')[2]}",
    )
    file = {"path": str, "size": int, "sha256": str, "blob": str}
    shown = {"key": str, "about": dict, "size": int, "files": [file]}
    revision = {
        "commit_hash": str,
        "size_on_disk": int,
        "num_files": int,
        "last_modified": str,
        "keys": [str],
    }
    repo = {"repo_id": str, "repo_type": str, "endpoint": str, "size_on_disk": int, "revisions": [revision]}
    usage = {"name": str, "objects": int, "size": int}
    count = {"blobs": int, "bytes": int}
    for arguments, expected in (
        (
            ("snapshots", "get", "gpt2"),
            {"path": str, "reference": {"key": str, "commit_hash": str, "size": int}},
        ),
        (("snapshots", "get", key, "--to", "x"), {"path": str, "key": str}),
        (("snapshots", "get", "gpt2", "--dry-run"), [{"path": str, "size": int, "will_download": bool}]),
        (("snapshots", "ls"), {"size_on_disk": int, "repos": [repo]}),
        (("snapshots", "show", "gpt2"), [repo]),
        (("snapshots", "show", f"gpt2@{commit}"), [shown]),
        (
            ("snapshots", "verify"),
            {"blobs": int, "problems": [{"manifest": str, "path": str, "problem": str}]},
        ),
        (
            ("models", "ls"),
            [
                {
                    **dict.fromkeys(("key", "label", "pathspec", "last_modified"), str),
                    **dict.fromkeys(("size", "num_files"), int),
                    "metadata": dict,
                }
            ],
        ),
        (("models", "show", model), shown),
        (("models", "get", model, "m"), {"path": str}),
        (("du",), {"store": str, "usage": [usage], "node_cache": usage}),
        (
            ("gc",),
            {
                "store": str,
                "dry_run": bool,
                **dict.fromkeys(("condemned", "deleted", "waiting", "spared"), count),
                "training": [],
            },
        ),
        (("models", "rm", model), {"key": str}),
        (("snapshots", "rm", "gpt2"), {"commits": [str], "expected_freed_size": int}),
    ):
        assert_shape(call_json(*arguments), expected, " ".join(arguments))


def assert_shape(value, expected, where: str) -> None:
    if isinstance(expected, dict):
        for name, inner in expected.items():
            assert_shape(value[name], inner, f"{where}: {name}")
    elif isinstance(expected, list):
        assert isinstance(value, list), where
        for item in value:
            assert_shape(item, expected[0], where)
    else:
        assert isinstance(value, expected), f"{where}: {value!r}"


@pytest.mark.parametrize(
    "command", ["snapshots get", "models show", "models get x", "gc --keep-days x", "nothing", "du x"]
)
def test_wrong_arguments_are_one_line_and_status_2(command: str):
    text = call(*command.split(), status=2)
    assert len(text.strip().splitlines()) == 1
    assert re.search(r"^Error: .*\. See `hf.* --help`\.$", text)


def test_tables_fit_a_terminal_and_keep_keys_whole(monkeypatch, capsys):
    rows = [
        ("5.0 MB", 12, "models/TrainFlow/17537000000002/merge/1234/best-f3a1722edcf3c78a.json"),
        ("3 B", 1, "a\x1b[31mb"),
    ]
    headings = (">SIZE", ">FILES", "KEY")
    print_table(headings, rows, empty="")
    assert capsys.readouterr().out.splitlines()[1:] == [
        f"5.0 MB     12  {rows[0][2]}",
        "   3 B      1  a\ufffd[31mb",
    ]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    print_table(headings, rows, empty="")
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "  SIZE  FILES",
        "  KEY",
        "5.0 MB     12",
        f"  {rows[0][2]}",
        "   3 B      1",
        "  a\ufffd[31mb",
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("snapshots", "get", "gpt2@a", "--revision", "b"), "SelectionError: 'gpt2@a' names a revision"),
        (("snapshots", "rm", "manifests/a/b/c/d.json"), "NotFound: "),
        (("snapshots", "get", "models/x"), "--to DIRECTORY"),
        (("snapshots", "get", "no/such"), "RepositoryNotFoundError: model 'no/such'"),
        (("snapshots", "get", "../etc"), "SelectionError: '../etc' is not the id"),
        (("snapshots", "show", "gpt2"), "no snapshot of a repository 'gpt2' is stored"),
        (("models", "show", "models/none/such/x/y/z.json"), "NotFound: nothing is stored"),
        (("models", "rm", "blobs/ab/abc"), "is not the key of"),
    ],
)
def test_what_goes_wrong_is_one_line(arguments, words):
    text = call(*arguments, status=1)
    assert words in text
    assert len(text.strip().splitlines()) == 1


def metaflow(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from metaflow.cmd.main_cli import start; start()", "hf", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=100)


def test_a_shell_gets_the_answer_alone_from_the_configured_datastore(subprocess_environment, project: Path):
    environment = {**subprocess_environment, "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(project)}
    # Commands need no name of a user, which root and containers lack.
    del environment["METAFLOW_USER"]
    got = metaflow(environment, "snapshots", "get", "gpt2", "--allow", "config.json")
    assert os.listdir(got.stdout.removesuffix("\n")) == ["config.json"]
    listed = metaflow(environment, "snapshots", "ls", "--json")
    assert json.loads(listed.stdout) == call_json("snapshots", "ls")
    assert listed.stderr == ""
    wrong = metaflow(environment, "snapshots", "get")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "Error: Missing argument 'TARGET'. See `-c hf snapshots get --help`.\n"
    assert metaflow(environment, "--help").stdout.startswith("Usage: ")


def test_what_one_user_got_another_does_not_get(hub, subprocess_environment, project: Path):
    environment = {**subprocess_environment, "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(project)}
    mine = {**environment, "HF_TOKEN": "hf_reader"}
    got = metaflow(mine, "snapshots", "get", "acme/gated-model", "--allow", "config.json", "--to", "mine")
    assert (got.returncode, got.stdout) == (0, "mine\n"), got.stderr
    commit = hub.content.repo("acme/gated-model").resolve().sha
    # Another user of the same datastore, on a machine of their own.
    theirs = {**environment, "METAFLOW_HF_CACHE": str(project / "other-node"), "HF_TOKEN": "hf_stranger"}
    for revision in ("main", commit):
        refused = metaflow(
            *(theirs, "snapshots", "get", "acme/gated-model", "--revision", revision),
            *("--allow", "config.json", "--to", "theirs"),
        )
        assert refused.returncode == 1
        assert refused.stderr.startswith("Error: GatedRepoError: access to model 'acme/gated-model'")
        assert len(refused.stderr.splitlines()) == 1
    assert not Path("theirs").exists()


def test_on_s3_everything_is_the_same(hub, s3_root: str, monkeypatch):
    monkeypatch.setattr(datastore, "_active", ("s3", s3_root))
    call("snapshots", "get", "gpt2", "--allow", "*.json")
    [repo] = call_json("snapshots", "ls")["repos"]
    [key] = repo["revisions"][0]["keys"]
    assert call_json("snapshots", "verify")["problems"] == []
    call("snapshots", "get", key, "--to", "out")
    assert Path("out/config.json").exists()
    assert call_json("du")["store"].startswith("s3://")
    assert call_json("gc")["condemned"]["blobs"] == 0
    assert call_json("snapshots", "rm", key) == {"key": key}
    assert call_json("snapshots", "ls")["repos"] == []
