"""``metaflow hf doctor``: what is well says so; what is broken on purpose is found, with what to do."""

import json
import os
import shutil
import sys
from datetime import UTC, datetime, timedelta
from importlib.metadata import metadata
from pathlib import Path

import pytest
from metaflow import metaflow_config
from metaflow._vendor.click.testing import CliRunner

from metaflow_extensions.hf import neighbours
from metaflow_hf.errors import UnsupportedStore
from metaflow_hf.store import datastore, open_store
from metaflow_hf.store.objects import CreateResult
from metaflow_hf.store.probing import try_out
from metaflow_hf_cli.checks import machine, packages, services
from metaflow_hf_cli.checks.findings import Check, Finding
from metaflow_hf_cli.group import hf


@pytest.fixture(autouse=True)
def project(hub, tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datastore, "_active", ("local", str(tmp_path / ".metaflow")))
    monkeypatch.setattr(metaflow_config, "USER", "tester")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(machine, "_LITTLE_DISK", 1)
    monkeypatch.setattr(machine, "_NO_DISK", 0)
    return tmp_path


def examined(*arguments):
    done = CliRunner(mix_stderr=False).invoke(hf, ["doctor", "--json", *arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, json.loads(done.stdout)


def findings(check: Check, status: str):
    return [finding for finding in check.findings() if finding.status == status]


def check_named(checks, subject):
    return next(check for check in checks if check.subject == subject)


def test_where_everything_works(project):
    status, found = examined()
    assert [item for item in found if item["status"] == "problem"] == []
    assert status == 0
    assert [item["subject"] for item in found if item["status"] == "ok"][:3] == [
        "packages",
        "extras",
        "extension",
    ]
    assert {item["subject"] for item in found} >= {
        "datastore",
        "metaflow",
        "hub",
        "clock",
        "token",
        "gpu",
        "disk",
    }
    assert all(item["fix"] for item in found if item["status"] != "ok")
    shown = CliRunner().invoke(hf, ["doctor"]).output
    assert "creates atomically" in shown
    assert not list((project / ".metaflow/mf.hf/probe").glob("*")), "nothing is left behind"


def test_each_problem_comes_with_what_to_do(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(metaflow_config, "USER", "root")
    done = CliRunner().invoke(hf, ["doctor"])
    assert done.exit_code == 1
    lines = done.output.splitlines()
    for problem, fix in (
        ("http://127.0.0.1:9 does not answer as a hub does", "check HF_ENDPOINT"),
        ("nobody says who runs the flows", "export METAFLOW_USER=you"),
    ):
        [number] = [number for number, line in enumerate(lines) if problem in line]
        assert lines[number].startswith("FAIL")
        assert fix in lines[number + 1]
    assert lines[-1].startswith("2 to fix")


def test_a_token_that_the_hub_refuses_is_no_reason_to_stop_at_the_hub(monkeypatch):
    check = check_named(services.checks(), "hub")
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    [bad] = findings(check, "problem")
    assert bad.subject == "token"
    assert "hf_nobody" not in bad.message + bad.fix
    from metaflow_hf_cli.fixtures import OWNER

    monkeypatch.setenv("HF_TOKEN", OWNER)
    assert any("knows you as owner" in finding.message for finding in findings(check, "ok"))


def test_what_requirements_are_not_met():
    found = list(
        packages.unmet(["torch>=999", "no-such-package>=1", "metaflow>=2", 'peft>=1; extra == "peft"'])
    )
    assert [finding.fix for finding in found] == [
        "pip install 'torch>=999'",
        "pip install 'no-such-package>=1'",
    ]


def test_who_answers_to_the_decorators(monkeypatch):
    check = check_named(packages.checks(), "extension")
    assert findings(check, "ok")
    monkeypatch.setattr(neighbours, "other_version", lambda: "0.2.1")
    assert "loses" in findings(check, "warning")[0].message
    theirs = {name: "metaflow_extensions.obcheckpoint.x" for name in ("model", "checkpoint")}
    monkeypatch.setattr(neighbours, "answering", lambda: theirs)
    [lost] = findings(check, "problem")
    assert "@model is metaflow_extensions.obcheckpoint.x" in lost.message
    assert "pip uninstall metaflow-checkpoint" in lost.fix


def test_a_store_without_atomic_create_is_found(tmp_path, monkeypatch):
    store = open_store(tmp_path / "store")
    assert abs((try_out(store) - datetime.now(UTC)).total_seconds()) < 60
    monkeypatch.setattr(
        type(store), "create", lambda self, key, data: (self.put(key, data), CreateResult(True, data))[1]
    )
    with pytest.raises(UnsupportedStore, match="atomic creation"):
        try_out(store)
    [bad] = findings(check_named(services.checks(), "datastore"), "problem")
    assert "credentials" in bad.fix


def test_clocks_that_differ():
    [well] = services.skew("clock", "the hub", datetime.now(UTC))
    [off] = services.skew("clock", "the hub", datetime.now(UTC) - timedelta(minutes=20))
    assert (well.status, off.status) == ("ok", "problem")
    assert "1,200 s" in off.message


def test_disks_and_gpus(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(machine, "_NO_DISK", usage.total * 2)
    [full] = machine.disk("disk", tmp_path / "not" / "there", "the cache", "export METAFLOW_HF_CACHE=/x")
    assert "too little" in full.message
    monkeypatch.setattr(os, "access", lambda *_: False)
    [closed] = machine.disk("disk", tmp_path, "the cache", "export METAFLOW_HF_CACHE=/x")
    assert "cannot be written" in closed.message
    torch = sys.modules.get("torch") or __import__("torch")
    if not torch.cuda.is_available():
        monkeypatch.setattr(machine, "_DRIVER", tmp_path)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        [blind] = machine.look_at_gpus()
        assert "unset CUDA_VISIBLE_DEVICES" in blind.fix


def test_a_torch_that_does_not_load_is_a_finding(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    [missing] = machine.look_at_gpus()
    assert missing.status == "problem"
    assert "pytorch.org/get-started" in missing.fix


def test_every_extra_is_looked_for():
    wanted = {extra for extra in metadata("metaflow-hf").get_all("Provides-Extra") if extra != "dev"}
    assert wanted == set(packages._EXTRAS)


def test_nothing_is_found_without_saying_what_to_do():
    with pytest.raises(AssertionError, match="what is to be done"):
        Finding("disk", "warning", "it is nearly full")
