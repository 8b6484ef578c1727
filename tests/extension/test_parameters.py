"""What a parameter of a flow may hold."""

import json
import os
import re
import runpy
import subprocess
import sys
from base64 import b64encode
from pathlib import Path

import pytest
from metaflow import FlowSpec, Parameter
from metaflow._vendor import click
from metaflow.plugins.argo import set_parameters as argo_parameters
from metaflow.plugins.aws.step_functions import set_batch_environment as step_functions_parameters

from metaflow_extensions.hf import parameters
from metaflow_extensions.hf.failures import Failure

ROOT = Path(__file__).parents[2]
HOSTILE = ["$(id)", "a`id`", "a\nb", "a;id", "../../etc", "${HOME}", "a\\b", "a\x00b"]


def value_of(kind: parameters.CheckedText, value: str, *command: str) -> str:
    """The value as Metaflow's command line hands it on, in this command."""
    context = None
    for name in ("flow.py", *command):
        context = click.Context(click.Command(name), info_name=name, parent=context)
    with context:
        return kind.convert(value, None, context)


@pytest.mark.parametrize("value", HOSTILE)
@pytest.mark.parametrize(
    "kind", [parameters.repo_id, parameters.revision, parameters.name], ids=lambda kind: kind.name
)
def test_names_hold_nothing_that_means_something_to_a_shell_or_a_path(kind, value):
    with pytest.raises(Failure, match="is not "):
        value_of(kind, value, "run")


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (parameters.repo_id, "gpt2"),
        (parameters.repo_id, "meta-llama/Llama-3.1_8B"),
        (parameters.model, "meta-llama/Llama-3.1_8B"),
        (parameters.model, "./my model"),
        (parameters.model, "~/models/mine/"),
        (parameters.revision, "refs/pr/12"),
        (parameters.revision, "v1.0-rc.1"),
        (parameters.name, "TrainFlow/argo-x-12"),
        (parameters.name, "models/TrainFlow/17/merge/5/model-0123456789abcdef.json"),
        (parameters.name, "über lang=1, try 2"),
        (parameters.source, "hf://owner/name:config:train@v1"),
        (parameters.source, "../my data (1).jsonl"),
        (parameters.source, "s3://bucket/texts/*.parquet"),
        (parameters.source, "datasets/python-docs-0123"),
        (parameters.text, "def f(x): # costs $5, `x`\n"),
    ],
)
def test_what_people_call_things_passes_unchanged(kind, value):
    assert value_of(kind, value, "run") == value
    assert value_of(kind, "", "run") == ""


@pytest.mark.parametrize(
    "value",
    ["hf://$(id)/x", "hf://a/b@$(id)", "hf://../x", "hf://a/b:c:d@x..y", "data;id", "data`id`", "a\nb"],
)
def test_sources_of_datasets_hold_names(value):
    with pytest.raises(Failure):
        value_of(parameters.source, value, "run")


@pytest.mark.parametrize("scheduler", ["argo-workflows", "step-functions"])
def test_on_the_way_to_a_scheduler_texts_hold_nothing_that_its_shell_expands(scheduler):
    for value in ("$(id)", "${HOME}", "`id`", "a\\"):
        with pytest.raises(Failure, match="the scheduler's shell would expand"):
            value_of(parameters.text, value, scheduler, "trigger")
    assert value_of(parameters.text, 'She said: "(a; b)"', scheduler, "trigger")
    with pytest.raises(Failure, match="other machines"):
        value_of(parameters.source, "../my.jsonl", scheduler, "trigger")
    with pytest.raises(
        Failure, match="a directory of this machine, which the tasks of a scheduler cannot read"
    ):
        value_of(parameters.model, "./mine", scheduler, "create")


def test_a_model_is_a_repository_or_a_directory():
    for value in ("a b", "$(id)", "owner/na;me"):
        with pytest.raises(Failure, match="is not the id of a repository.*write its path, as ./directory"):
            value_of(parameters.model, value, "run")


@pytest.mark.parametrize(
    ("scheduler", "given", "expanded"),
    [("argo", "acme/$(echo 'a b')", "acme/a b"), ("step-functions", "a/`echo ../..`", "a/../..")],
)
def test_the_task_refuses_what_a_scheduler_was_given_directly(tmp_path: Path, scheduler, given, expanded):
    """Through the script by which Metaflow hands parameters to the first container. Its shell executes first."""
    script = tmp_path / "parameters"
    if scheduler == "argo":
        argo_parameters.export_parameters(str(script), {"repo_id": (b64encode(given.encode()).decode(), "f")})
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("METAFLOW_PARAMETERS", json.dumps({"repo_id": given}))
            step_functions_parameters.export_parameters(str(script))
    # As the container's command goes on.
    command = (
        f'. "{script}" && exec "{sys.executable}" "{ROOT / "flows/hub_flow.py"}" init --run-id 1 --task-id 2'
    )
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "METAFLOW_USER": "tester"}
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert f"{expanded!r} is not the id of a repository" in done.stdout
    assert "Traceback" not in done.stdout


def test_one_of_a_few_words():
    kind = parameters.one_of("raise", "skip")
    assert value_of(kind, "skip", "run") == "skip"
    with pytest.raises(Failure, match="'stop' is none of raise, skip"):
        value_of(kind, "stop", "run")


def test_runner_and_deployer_know_the_types(tmp_path):
    code = """
from metaflow.metaflow_config import get_click_to_python_types
from metaflow_extensions.hf.parameters import CheckedText
print(get_click_to_python_types()[CheckedText].__name__)
"""
    # Elsewhere: Metaflow's list of extensions must not come from what lies about here.
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert told.stdout == "str\n"


def test_a_configuration_is_checked_as_parameters_are():
    assert parameters.parse_config("model: {repo_id: gpt2}")["resources"] == {
        "gpu": 1,
        "cpu": 4,
        "memory": 16_000,
    }
    for text in ("model: {repo_id: $(id)}", "model: {revision: a;b}", "data: {dataset: hf://a/`id`}"):
        with pytest.raises(Failure, match="is not"):
            parameters.parse_config(text)


@pytest.mark.parametrize("flow", sorted((ROOT / "flows").glob("*.py")), ids=lambda path: path.stem)
def test_every_text_that_a_flow_takes_is_checked(flow: Path):
    [made] = [
        value
        for value in runpy.run_path(str(flow), run_name="flow").values()
        if isinstance(value, type) and issubclass(value, FlowSpec) and value is not FlowSpec
    ]
    for parameter in vars(made).values():
        if type(parameter) is Parameter:
            parameter.init()
            assert parameter.kwargs["type"] is not str, parameter.name


def test_the_example_of_the_documents():
    text = (ROOT / "docs" / "deploy.md").read_text("utf-8")
    [block] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, object] = {}
    exec(block, names)
    names["MyFlow"].repo_id.init()
    assert isinstance(names["MyFlow"].repo_id.kwargs["type"], parameters.CheckedText)
