"""Every flow can be deployed to both schedulers with all that Metaflow offers for it, and refuses what a shell would
execute before it is handed to one.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from schedulers.deployments import Deployments
from schedulers.images import Image

from .conftest import FLOWS

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(900)]
# Steps get these on the command line.
WITH = [
    "--with",
    "resources:gpu=2,cpu=3,memory=5000",
    "--with",
    "retry:times=2,minutes_between_retries=7",
    "--with",
    "timeout:hours=4",
    "--with",
    'environment:vars={"COLOR": "blue"}',
]


@pytest.fixture
def deployed(deployments, tmp_path: Path) -> Deployments:
    # Nothing runs here, so the image may be empty.
    return deployments(Image(tmp_path))


def decorated(deployed: Deployments, flow: str, *decorators: str) -> Path:
    """A copy of a flow as its user would decorate it."""
    source = (FLOWS / flow).read_text()
    names = ", ".join(sorted({re.match(r"@(\w+)", line)[1] for line in decorators}))
    source = re.sub(r"\n\n\n(?=class )", f"\n\n\nfrom metaflow import {names}\n\n", source, count=1)
    source = re.sub(r"(?m)^(?=class \w+\(FlowSpec\))", "\n".join(decorators) + "\n", source, count=1)
    path = deployed.directory / flow
    path.write_text(source)
    return path


@pytest.mark.parametrize(
    ("flow", "name", "parameters"),
    [
        ("hub_flow.py", "HubFlow", {"repo_id": "metaflow-hf/tiny-llama", "revision": "main"}),
        ("dataset_flow.py", "DatasetFlow", {"num_branches": 2, "ascii_only": False, "on_bad_row": "raise"}),
        ("evaluate_flow.py", "EvaluateFlow", {"models": "TrainFlow", "max_new_tokens": 48}),
        ("generate_flow.py", "GenerateFlow", {"temperature": 0.8, "prompt": "Return the ", "seed": 0}),
    ],
)
class TestEveryFlow:
    def test_on_argo_workflows(self, deployed: Deployments, flow, name, parameters):
        path = decorated(
            deployed,
            flow,
            '@project(name="models")',
            '@schedule(cron="0 3 * * ? *", timezone="Europe/Berlin")',
            '@trigger_on_finish(flow="TrainFlow")',
        )
        deployed.succeed(path, *WITH, "--with", "kubernetes", "--production", "argo-workflows", "create")

        deployment = f"models.prod.{name.lower()}"
        template = deployed.template(deployment)
        assert defaults_of(template).items() >= parameters.items()
        assert template["metadata"]["annotations"]["metaflow/project_name"] == "models"
        for step in containers(template):
            assert step["retryStrategy"]["limit"] >= 2
            assert step["activeDeadlineSeconds"] == 4 * 3600
            limits = amounts(step)
            assert (limits["nvidia.com/gpu"], limits["cpu"], limits["memory"]) == ("2", "3", "5000M")
            assert {"name": "COLOR", "value": "blue"} in plain(step["container"]["env"])
            assert step["container"]["image"] == "registry/metaflow-hf"
        assert {step["retryStrategy"]["backoff"]["duration"] for step in containers(template)} >= {"7m"}
        cron = deployed.cluster.of_kind("cronworkflows")[deployment]["spec"]
        assert (cron["schedule"], cron["timezone"]) == ("0 3 * * ?", "Europe/Berlin")
        sensor = deployed.cluster.of_kind("sensors")[deployment.replace(".", "-")]
        assert "metaflow.models.prod.TrainFlow.end" in json.dumps(sensor)

    def test_on_step_functions(self, deployed: Deployments, flow, name, parameters):
        path = decorated(deployed, flow, '@project(name="models")', '@schedule(cron="0 3 * * ? *")')
        secret = ["--with", 'secrets:sources=["hf-token"]']
        deployed.succeed(path, *WITH, "--with", "batch", *secret, "--production", "step-functions", "create")

        machine = deployed.account.state_machine(f"models.prod.{name}")
        definition = json.loads(machine["definition"])
        assert json.loads(
            environment_of(jobs(definition)["start"])["METAFLOW_DEFAULT_PARAMETERS"]
        ).items() >= (parameters.items())
        for job in jobs(definition).values():
            assert job["RetryStrategy"]["Attempts"] >= 3
            assert job["Timeout"]["AttemptDurationSeconds"] == 4 * 3600
            assert environment_of(job)["COLOR"] == "blue"
            wanted = {
                item["Type"]: item["Value"] for item in job["ContainerOverrides"]["ResourceRequirements"]
            }
            assert wanted == {"GPU": "2", "VCPU": "3", "MEMORY": "5000"}
            client = deployed.account.client("batch")
            [job_definition] = client.describe_job_definitions(jobDefinitions=[job["JobDefinition"]])[
                "jobDefinitions"
            ]
            assert job_definition["containerProperties"]["image"] == "registry/metaflow-hf"
        events = deployed.account.client("events")
        rule = events.describe_rule(Name=machine["name"])
        assert (rule["ScheduleExpression"], rule["State"]) == ("cron(0 3 * * ? *)", "ENABLED")
        [target] = events.list_targets_by_rule(Rule=machine["name"])["Targets"]
        assert target["Arn"] == machine["stateMachineArn"]


def test_the_configuration_is_frozen_and_says_what_a_branch_gets(deployed: Deployments):
    text = (deployed.directory / "small.yaml").read_text()
    (deployed.directory / "small.yaml").write_text(
        text.replace("gpu: 0, cpu: 1, memory: 2048", "gpu: 4, cpu: 6, memory: 8192")
    )
    options = ["--config", "config", "small.yaml"]
    path = decorated(
        deployed,
        "train_flow.py",
        '@project(name="models")',
        "@schedule(daily=True)",
        '@trigger(event="new-data")',
    )
    more = ["--with", "kubernetes", "--with", "timeout:hours=4", "--branch", "main"]
    deployed.succeed(path, *options, *more, "argo-workflows", "create")
    deployment = "models.test.main.trainflow"
    template = deployed.template(deployment)
    steps = {step["name"]: step for step in containers(template)}
    limits = amounts(steps["train"])
    assert (limits["nvidia.com/gpu"], limits["cpu"], limits["memory"]) == ("4", "6", "8192M")
    assert "nvidia.com/gpu" not in amounts(steps["prepare"])
    # Retried as the flow says, at once: others wait for its claims.
    assert steps["train"]["retryStrategy"]["limit"] == 3
    assert steps["train"]["retryStrategy"]["backoff"]["duration"] == "0m"
    assert {step["activeDeadlineSeconds"] for step in steps.values()} == {4 * 3600}
    # What a start of the deployment may say otherwise, and what starts it by itself.
    assert set(defaults_of(template)) >= {"repo_id", "dataset", "num_gpus", "lineage", "max_tokens"}
    assert deployed.cluster.of_kind("cronworkflows")[deployment]["spec"]["schedule"] == "0 0 * * ?"
    sensor = deployed.cluster.of_kind("sensors")[deployment.replace(".", "-")]
    assert "new-data" in json.dumps(sensor["spec"]["dependencies"])

    # A configuration that names what cannot be is refused before anything is deployed.
    asked = len(deployed.cluster.requests)
    (deployed.directory / "small.yaml").write_text(text.replace("metaflow-hf/tiny-llama", "'$(id)'"))
    status, output = deployed.run(FLOWS / "train_flow.py", *options, "argo-workflows", "create")
    assert status != 0
    assert "SelectionError:" in output
    assert "'$(id)' is not the id of a repository" in output
    assert deployed.cluster.requests[asked:] == []


@pytest.mark.parametrize(
    ("flow", "scheduler", "parameter", "value"),
    [
        ("train_flow.py", "argo-workflows", "repo_id", "gpt2$(touch pwned)"),
        ("generate_flow.py", "step-functions", "prompt", "a `touch pwned`"),
    ],
)
def test_what_a_shell_would_execute_is_not_handed_to_a_scheduler(
    deployed: Deployments, flow, scheduler, parameter, value
):
    asked = len(deployed.cluster.requests)
    status, output = deployed.run(FLOWS / flow, scheduler, "trigger", f"--{parameter}", value)
    assert status != 0
    assert "SelectionError:" in output, output
    assert "Traceback" not in output
    assert deployed.cluster.requests[asked:] == []
    assert not list(deployed.directory.rglob("pwned"))


def containers(template: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of steps, without the hook that reports errors."""
    return [
        each
        for each in template["spec"]["templates"]
        if "metaflow/step_name" in each.get("metadata", {}).get("annotations", {})
    ]


def amounts(step: dict[str, Any]) -> dict[str, str]:
    resources = step["container"]["resources"]
    found = {**resources["requests"], **resources["limits"]}
    return {name: amount.replace(".0", "") for name, amount in found.items()}


def defaults_of(template: dict[str, Any]) -> dict[str, Any]:
    return {each["name"]: json.loads(each["value"]) for each in template["spec"]["arguments"]["parameters"]}


def plain(environment: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"name": each["name"], "value": each.get("value")} for each in environment]


def jobs(machine: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The Batch jobs of a state machine and of all machines within it, by step."""
    found = {}
    for name, state in machine["States"].items():
        if state["Type"] == "Map":
            found |= jobs(state["Iterator"])
        elif "batch:" in state.get("Resource", ""):
            found[name] = state["Parameters"]
    return found


def environment_of(job: dict[str, Any]) -> dict[str, str]:
    return {
        item["Name"]: item["Value"] for item in job["ContainerOverrides"]["Environment"] if "Value" in item
    }
