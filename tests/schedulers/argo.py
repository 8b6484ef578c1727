"""Runs a workflow template as Argo Workflows does, as far as Metaflow makes use of it: DAGs of containers and of other
DAGs, `withParam`, parameters and expressions in double braces, retries, deadlines. What it does not know is an error;
hooks at the end of a workflow, which report errors, are left out.

https://argo-workflows.readthedocs.io/en/latest/fields/ and …/variables/
"""

import base64
import json
import re
import uuid
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .images import Image
from .pods import Pod, Watch, ignore, tail

_BRACES = re.compile(r"\{\{(=?)(.+?)\}\}", re.DOTALL)
_BASE64_OF = re.compile(r"toBase64\((workflow\.parameters|inputs\.parameters)\['([^']+)'\]\)")

Scope = Mapping[str, str]


class WorkflowFailed(Exception):
    """A task failed after its last retry; its log is in the message."""


@dataclass
class Workflow:
    """One submitted workflow. `watch(pod, step, index, attempt)` is told of every container that starts."""

    template: Mapping[str, Any]
    submission: Mapping[str, Any]
    image: Image
    root: Path
    role: Mapping[str, str]
    watch: Watch = ignore
    pods: list[Pod] = field(default_factory=list)

    def __post_init__(self) -> None:
        spec = self.template["spec"]
        self.name = self.submission["metadata"]["name"]
        self.run_id = f"argo-{self.name}"
        self._templates = {template["name"]: template for template in spec["templates"]}
        given = {
            parameter["name"]: parameter["value"]
            for parameter in self.submission["spec"]["arguments"]["parameters"]
        }
        declared = {
            parameter["name"]: parameter["value"] for parameter in spec["arguments"].get("parameters", ())
        }
        assert set(given) <= set(declared), f"unknown parameters {set(given) - set(declared)}"
        self._globals = {
            "workflow.name": self.name,
            "workflow.creationTimestamp": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            **{f"workflow.parameters.{name}": value for name, value in {**declared, **given}.items()},
        }

    def run(self) -> None:
        """Raises `WorkflowFailed`."""
        self._run(self.template["spec"]["entrypoint"], {})

    def _run(self, name: str, inputs: Scope) -> dict[str, str]:
        """Runs a template; returns its output parameters."""
        template = self._templates[name]
        declared = {parameter["name"] for parameter in template.get("inputs", {}).get("parameters", ())}
        assert declared <= set(inputs), f"{name} wants {declared}, is given {set(inputs)}"
        scope = {**self._globals, **{f"inputs.parameters.{key}": value for key, value in inputs.items()}}
        if "container" in template:
            return self._run_container(template, scope)
        return self._run_dag(template, scope)

    def _run_dag(self, template: Mapping[str, Any], scope: Scope) -> dict[str, str]:
        scope = dict(scope)
        waiting = list(template["dag"]["tasks"])
        succeeded: set[str] = set()
        running: dict[Future[None], str] = {}
        with ThreadPoolExecutor() as pool:
            while waiting or running:
                for task in list(waiting):
                    needs = task.get("depends", "")
                    if all(need.strip().removesuffix(".Succeeded") in succeeded for need in _needs(needs)):
                        waiting.remove(task)
                        running[pool.submit(self._run_task, task, scope)] = task["name"]
                assert running, f"nothing can start of {[task['name'] for task in waiting]}"
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    # failFast: the first failure keeps others from being started.
                    done.result()
                    succeeded.add(running.pop(done))
        return {
            parameter["name"]: _substitute(parameter["valueFrom"]["parameter"], scope)
            for parameter in template.get("outputs", {}).get("parameters", ())
        }

    def _run_task(self, task: Mapping[str, Any], scope: dict[str, str]) -> None:
        unknown = set(task) - {"name", "template", "depends", "arguments", "withParam"}
        assert not unknown, f"task {task['name']} has {unknown}"
        given = task.get("arguments", {}).get("parameters", ())

        def run(item: str | None) -> dict[str, str]:
            here = scope if item is None else {**scope, "item": item}
            inputs = {parameter["name"]: _substitute(parameter["value"], here) for parameter in given}
            return self._run(task["template"], inputs)

        if "withParam" in task:
            items = [json.dumps(item) for item in json.loads(_substitute(task["withParam"], scope))]
            with ThreadPoolExecutor(max_workers=len(items)) as pool:
                # What several give is a list, in whatever order.
                outputs = list(pool.map(run, items))
            merged = {key: json.dumps([each[key] for each in outputs]) for key in outputs[0]}
        else:
            merged = run(None)
        scope.update({f"tasks.{task['name']}.outputs.parameters.{key}": merged[key] for key in merged})

    def _run_container(self, template: Mapping[str, Any], scope: Scope) -> dict[str, str]:
        limit = int(template.get("retryStrategy", {}).get("limit", 0))
        for attempt in range(limit + 1):
            pod = self._start(template, {**scope, "retries": str(attempt)}, attempt)
            status = pod.wait(template.get("activeDeadlineSeconds"))
            if status == 0:
                return {
                    parameter["name"]: pod.output(parameter["valueFrom"]["path"]).strip()
                    for parameter in template.get("outputs", {}).get("parameters", ())
                }
        raise WorkflowFailed(f"{template['name']}, exit status {status}:\n{tail(pod.printed())}")

    def _start(self, template: Mapping[str, Any], scope: Scope, attempt: int) -> Pod:
        container = template["container"]
        index = scope.get("inputs.parameters.split-index", "0")
        name = f"{template['name']}-{index}-{attempt}"
        fields = {
            "metadata.namespace": "default",
            "metadata.name": f"{self.name}-{name}",
            "metadata.uid": str(uuid.uuid4()),
            "spec.serviceAccountName": template["serviceAccountName"] or "default",
            "status.hostIP": "127.0.0.1",
        }
        environment = {
            variable["name"]: _substitute(variable["value"], scope)
            if variable.get("value") is not None
            else fields[variable["valueFrom"]["fieldRef"]["fieldPath"]]
            for variable in container["env"]
        }
        pod = Pod(
            self.image,
            self.root / self.name / name,
            [_substitute(word, scope) for word in container["command"]],
            {**self.role, **environment},
            emissary=True,
        )
        self.pods.append(pod)
        self.watch(pod, template["name"], int(index), attempt)
        return pod


def _needs(depends: str) -> list[str]:
    assert "||" not in depends, depends
    return [need for need in depends.split("&&") if need.strip()]


def _substitute(text: str, scope: Scope) -> str:
    """Argo replaces text, wherever it stands, before anything reads it."""

    def value(found: re.Match[str]) -> str:
        is_expression, inside = found[1], found[2].strip()
        if not is_expression:
            return scope[inside]
        expression = _BASE64_OF.fullmatch(inside)
        assert expression, f"unknown expression {inside}"
        return base64.b64encode(scope[f"{expression[1]}.{expression[2]}"].encode()).decode()

    return _BRACES.sub(value, text)
