"""``metaflow hf training``: what it says of trainings on disk and on S3, in tables and in JSON."""

import json
import threading
import time
from pathlib import Path

import pytest
from metaflow._vendor.click.testing import CliRunner

from metaflow_hf.data import process_raw_dataset_to_blocks
from metaflow_hf.store import configured_store, datastore
from metaflow_hf.train.heartbeat import Heartbeat, Patience
from metaflow_hf.train.lineage import Lineage
from metaflow_hf.train.records import Accepted, ClaimRecord, Payload, Round, Spec
from metaflow_hf_cli import training as module
from metaflow_hf_cli.group import hf

WEIGHTS = Payload(key="weights/0", digest="d", size=1)


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path: Path, monkeypatch):
    """Metaflow's datastore, which holds a dataset of ten claims."""
    location = str(tmp_path / ".metaflow") if request.param == "local" else request.getfixturevalue("s3_root")
    monkeypatch.setattr(datastore, "_active", (request.param, location))
    store = configured_store()
    raw, blocks = tmp_path / "raw.txt", tmp_path / "blocks"
    raw.write_text("a row\n" * 20, "utf-8")
    process_raw_dataset_to_blocks(raw, blocks, "rows", block_size=10)
    for path in blocks.rglob("*"):
        if path.is_file():
            store.put(f"datasets/rows-01/{path.relative_to(blocks).as_posix()}", path.read_bytes())
    return store


def begin(root, name: str) -> Lineage:
    lineage = Lineage(root.child(f"training/{name}"))
    from metaflow_hf.data.records import read_manifest

    lineage.create_spec(
        Spec(
            lineage=name,
            dataset={"key": "rows", "digest": read_manifest(root.child("datasets/rows-01")).digest},
            order={
                "seed": 0,
                "shuffle": True,
                "epochs": 1,
                "chunk_samples": 10,
                "claim_samples": 2,
                "num_samples": 20,
            },
            num_positions=10,
            max_tokens=None,
            hyperparameters={},
            config_digest="c",
            initial_weights=WEIGHTS,
        )
    )
    lineage.create_round(Round(nonce="n", round=0, parent=None, weights=WEIGHTS))
    return lineage


def close(lineage: Lineage, *, done: int, **facts) -> None:
    base = lineage.newest()
    work = Accepted(
        attempt="a" * 16,
        positions=[(len(base.manifest.settled), done)],
        tokens=1000,
        loss=5.25,
        delta_digest="d",
    )
    lineage.create_round(
        Round(
            nonce="n",
            round=base.number + 1,
            parent=base.digest,
            weights=WEIGHTS,
            accepted=[work],
            done=[(0, done)],
            tokens=base.manifest.tokens + 1000,
            **facts,
        )
    )


def call(*arguments: str, status: int = 0) -> str:
    done = CliRunner(mix_stderr=False).invoke(hf, ["training", *arguments])
    assert done.exit_code == status, done.output + done.stderr
    assert "Traceback" not in done.output + done.stderr
    return done.output if status == 0 else done.stderr


def test_trainings_from_nothing_to_the_last_round(root):
    assert call("ls") == "no trainings are stored\n"
    assert json.loads(call("ls", "--json")) == []
    root.put("training/Flow-7/weights/0000000000/d/model.safetensors", b"x")
    assert "is being started" in call("status", "Flow-7")
    assert call("log", "Flow-7") == ""

    lineage = begin(root, "Flow-8")
    close(lineage, done=2)
    close(lineage, done=3, failures={4: 2}, rejected={"b" * 16: "a value \x1b[31m is not finite"})
    lineage.create_claim(2, 5, ClaimRecord(attempt="a" * 16, nonce="n"))
    Heartbeat(lineage.store, "a" * 16, patience=Patience(), process=None).begin()
    listed = call("ls").splitlines()
    assert listed[0].split() == [
        "LAST",
        "ROUND",
        "(UTC)",
        "STATE",
        "ROUND",
        "DONE",
        "TOKENS",
        "LOSS",
        "LINEAGE",
    ]
    assert listed[1].split()[2:] == ["open", "2", "30", "%", "2k", "5.25", "Flow-8"]
    assert listed[2].split()[-1] == "Flow-7"
    text = call("status", "Flow-8", "--watch", "0.1")
    for words in (
        "Flow-8: open, 1 silent",
        "3 of 10 done (30 %), 1 claimed, 6 left",
        "0 of 2 done",
        "2,000 of about 6,667 (30 %)",
        "5.25 nats per token",
        "2 claims in the rounds below, 1 contribution not used",
        f"{'a' * 16}  silent       1",
        "block ",
    ):
        assert words in text
    assert max(map(len, text.splitlines())) <= 80
    found = json.loads(call("status", "Flow-8", "--watch", "0", "--json"))
    assert (found["positions_claimed"], found["workers"][0]["state"]) == (1, "silent")
    assert found["failing"][0]["block_id"] in (0, 1)
    [_, summary] = sorted(json.loads(call("ls", "--json")), key=lambda one: one["lineage"])
    assert (summary["lineage"], summary["tokens"]) == ("Flow-8", 2000)

    lines = call("log", "Flow-8").splitlines()
    assert [line.split()[2].rstrip(",") for line in lines[:3]] == ["0", "1", "2"]
    assert "lost 2" in lines[2]
    assert (
        lines[3]
        == f"  the work of {'b' * 16} is not used: a value \N{REPLACEMENT CHARACTER}[31m is not finite"
    )
    assert len(call("log", "Flow-8", "--last", "1").splitlines()) == 2
    close(lineage, done=10, final=True)
    assert "final, not exported yet" in call("status", "Flow-8")
    lineage.store.create("exports/d.json", b'{"key": "models/Flow/8/merge/1/model-d.json"}')
    assert "models/Flow/8/merge/1/model-d.json" in call("status", "Flow-8")


def test_a_name_that_is_nearly_right(root):
    begin(root, "TrainFlow-17")
    begin(root, "mine!2Ftoo")
    message = call("status", "TrainFlow-71", status=1)
    assert message.count("\n") == 1
    assert "did you mean 'TrainFlow-17'?" in message
    assert "training ls" in call("log", "something else", status=1)
    assert "mine!2Ftoo: open, nobody is at work" in call("status", "mine/too")


def test_follow_goes_on_until_the_last_round(root, monkeypatch):
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.01)
    lineage = begin(root, "Flow-9")
    answers = []
    follower = threading.Thread(target=lambda: answers.append(call("log", "Flow-9", "--follow", "--json")))
    follower.start()
    close(lineage, done=4)
    time.sleep(0.05)
    close(lineage, done=10, final=True)
    follower.join(60)
    (text,) = answers
    rounds = [json.loads(line) for line in text.splitlines()]
    assert [one["round"] for one in rounds] == [0, 1, 2]
    assert [one["final"] for one in rounds] == [False, False, True]


def test_reading_changes_nothing(root):
    lineage = begin(root, "Flow-8")
    close(lineage, done=10, final=True)
    before = [(info.key, info.last_modified) for info in root.list()]
    call("ls")
    call("status", "Flow-8", "--watch", "0")
    call("log", "Flow-8")
    assert [(info.key, info.last_modified) for info in root.list()] == before
