"""docs/deploy.md: its commands can be read by a shell, its settings exist, its rights are those that are used."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import boto3
import pytest
import yaml

TEXT = (Path(__file__).parents[1] / "docs" / "deploy.md").read_text("utf-8")
METAFLOW = Path(__import__("metaflow").__file__).parent
# Permissions that are no operations of the same name.
PERMISSIONS = {"GetObject", "PutObject", "DeleteObject", "AbortMultipartUpload", "ListBucket", "PassRole"}


def blocks_of(kind: str, heading: str = "") -> list[str]:
    part = TEXT.partition(f"## {heading}")[2].partition("\n## ")[0] if heading else TEXT
    assert part
    return re.findall(rf"```{kind}\n(.*?)```", part, re.DOTALL)


@pytest.mark.parametrize(
    ("scheduler", "command"), [("Argo Workflows", "argo-workflows"), ("Step Functions", "step-functions")]
)
def test_ten_commands_lead_to_each_scheduler(scheduler: str, command: str):
    [block] = blocks_of("bash", f"To {scheduler}, in ten commands")
    lines = block.splitlines()
    assert len(lines) == 10
    assert [verb for verb in ("create", "trigger") if any(f"{command} {verb}" in line for line in lines)] == [
        "create",
        "trigger",
    ]
    # What is built is what is run.
    assert (
        len(
            {
                image
                for line in lines
                for image in re.findall(r"\S+/metaflow-hf:[\w-]+", line.replace("=", " "))
            }
        )
        == 1
    )


@pytest.mark.parametrize("block", blocks_of("bash"))
def test_a_shell_can_read_every_block(block: str):
    subprocess.run([shutil.which("bash"), "-n"], input=block, text=True, check=True)


def test_every_setting_exists():
    config = (METAFLOW / "metaflow_config.py").read_text()
    known = {f"METAFLOW_{name}" for name in re.findall(r'from_conf\(\s*"(\w+)"', config)}
    ours = (Path(__file__).parents[1] / "src" / "metaflow_hf" / "environment.py").read_text()
    known |= set(re.findall(r"METAFLOW_HF_\w+", ours))
    named = set(re.findall(r"METAFLOW_[A-Z0-9_]+", TEXT))
    assert named - known == set()
    assert len(named) > 10


def test_policies_allow_operations_that_exist_on_resources_that_are_named():
    policies = [json.loads(block) for block in blocks_of("json")]
    assert len(policies) == 3
    session = boto3.Session(region_name="us-east-1")
    names = {"states": "stepfunctions"}
    for statement in (statement for policy in policies for statement in policy["Statement"]):
        actions = statement["Action"]
        for action in [actions] if isinstance(actions, str) else actions:
            service, _, operation = action.partition(":")
            assert "*" not in action
            if service in ("s3", "iam"):
                assert operation in PERMISSIONS
            else:
                model = session._session.get_service_model(names.get(service, service))
                assert operation in model.operation_names, action
        # Jobs and their definitions have no names before they are made.
        assert statement["Resource"] != "*" or statement["Sid"] in ("Jobs", "JobDefinitions")


def operations_of(source: str, service: str) -> set[str]:
    """What a module of Metaflow asks a service of AWS for."""
    text = (METAFLOW / "plugins" / "aws" / "step_functions" / source).read_text()
    called = set(re.findall(r"_client\.(\w+)\(", text)) - {"get_paginator"}
    called |= set(re.findall(r"get_paginator\(\s*\"(\w+)\"", text))
    assert called
    return {f"{service}:{name.title().replace('_', '')}" for name in called}


def test_roles_of_step_functions_may_do_what_metaflow_does():
    tasks, _, deployers = (
        {statement["Sid"]: statement["Action"] for statement in json.loads(block)["Statement"]}
        for block in blocks_of("json")
    )
    # A join reads in its own container which tasks are before it.
    assert set(tasks["ForeachOnStepFunctions"]) == operations_of("dynamo_db_client.py", "dynamodb")
    allowed = {*deployers["StateMachines"], *deployers["JobDefinitions"]}
    assert operations_of("step_functions_client.py", "states") - allowed == set()
    # What a schedule needs besides is in the text.
    scheduling = operations_of("event_bridge_client.py", "events")
    assert scheduling - set(deployers["NoSchedule"]) == {"events:PutRule", "events:PutTargets"}
    assert all(f"`{operation}`" in TEXT for operation in scheduling - set(deployers["NoSchedule"]))


def test_deployers_may_do_what_deploying_does_and_nothing_else():
    roles = {
        role["metadata"]["name"]: role
        for block in blocks_of("yaml")
        for role in yaml.safe_load_all(block)
        if role["kind"] == "Role"
    }
    source = (METAFLOW / "plugins" / "argo" / "argo_client.py").read_text()
    asked = re.findall(r"(\w+)_namespaced_custom_object\(.*?plural=\"(\w+)\"", source, re.DOTALL)
    verbs = {"replace": "update"}
    needed = {(verbs.get(verb, verb), plural) for verb, plural in asked}
    rules = [rule for rule in roles["metaflow-deployer"]["rules"] if rule["apiGroups"] == ["argoproj.io"]]
    given = {(verb, plural) for rule in rules for plural in rule["resources"] for verb in rule["verbs"]}
    assert needed - given == set()
    # `kubectl get workflows --watch`.
    assert given - needed == {("list", "workflows"), ("watch", "workflows")}
    assert {"serviceaccounts", "secrets"}.isdisjoint(plural for _, plural in given)
