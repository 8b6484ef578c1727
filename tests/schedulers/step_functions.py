"""Runs a state machine as AWS Step Functions does, as far as Metaflow makes use of it: Task (Batch jobs, DynamoDB), Map
and Parallel, JSONPath. Batch jobs are containers here, with their definition's and their own settings.

https://states-language.net/spec.html
"""

import json
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import jsonpath_ng.ext

from .images import Image
from .pods import Pod, Watch, ignore, tail


class ExecutionFailed(Exception):
    """A job failed after its last attempt; its log is in the message."""


@dataclass
class Execution:
    """One execution of a state machine. `watch(pod, step, index, attempt)` is told of every container that starts."""

    definition: Mapping[str, Any]
    name: str
    given: Mapping[str, Any]
    image: Image
    root: Path
    role: Mapping[str, str]
    watch: Watch = ignore
    client: Callable[[str], Any] = boto3.client
    pods: list[Pod] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.run_id = f"sfn-{self.name}"
        self._context = {"Execution": {"Name": self.name, "Input": self.given}}

    def run(self) -> None:
        """Raises `ExecutionFailed`."""
        self._run(self.definition, dict(self.given), self._context)

    def _run(self, machine: Mapping[str, Any], data: Any, context: Mapping[str, Any]) -> Any:
        name = machine["StartAt"]
        while True:
            state = machine["States"][name]
            do = {"Task": self._task, "Parallel": self._parallel, "Map": self._map}[state["Type"]]
            result = do(name, state, data, context)
            data = _placed(state, data, result)
            if state.get("End"):
                return data
            name = state["Next"]

    def _task(self, name: str, state: Mapping[str, Any], data: Any, context: Mapping[str, Any]) -> Any:
        parameters = _filled(state["Parameters"], data, context)
        service = state["Resource"].partition(":states:::")[2]
        if service == "dynamodb:getItem":
            return self.client("dynamodb").get_item(**parameters)
        assert service == "batch:submitJob.sync", f"{name} wants {service}"
        return self._batch_job(name, parameters)

    def _parallel(self, name: str, state: Mapping[str, Any], data: Any, context: Mapping[str, Any]) -> Any:
        with ThreadPoolExecutor(max_workers=len(state["Branches"])) as pool:
            return list(pool.map(lambda branch: self._run(branch, data, context), state["Branches"]))

    def _map(self, name: str, state: Mapping[str, Any], data: Any, context: Mapping[str, Any]) -> Any:
        assert state["Iterator"]["ProcessorConfig"]["Mode"] == "INLINE"
        items = _select(state["ItemsPath"], data, context)

        def run(item: Any) -> Any:
            here = {**context, "Map": {"Item": {"Value": item}}}
            return self._run(state["Iterator"], _filled(state["Parameters"], data, here), here)

        with ThreadPoolExecutor(max_workers=state["MaxConcurrency"] or len(items)) as pool:
            return list(pool.map(run, items))

    def _batch_job(self, name: str, job: Mapping[str, Any]) -> dict[str, Any]:
        [definition] = self.client("batch").describe_job_definitions(jobDefinitions=[job["JobDefinition"]])[
            "jobDefinitions"
        ]
        overrides = job["ContainerOverrides"]
        assert definition["containerProperties"]["image"]
        job_id = str(uuid.uuid4())
        environment = {item["Name"]: item["Value"] for item in overrides["Environment"]}
        assert all(isinstance(value, str) for value in environment.values()), environment
        index = int(environment.get("METAFLOW_SPLIT_INDEX", "0"))
        for attempt in range(job["RetryStrategy"]["Attempts"]):
            pod = Pod(
                self.image,
                self.root / self.name / f"{name}-{job_id[:8]}-{attempt}",
                overrides["Command"],
                {
                    **self.role,
                    **environment,
                    "AWS_BATCH_JOB_ID": job_id,
                    "AWS_BATCH_JOB_ATTEMPT": str(attempt + 1),
                    "AWS_BATCH_JQ_NAME": job["JobQueue"],
                    "AWS_BATCH_CE_NAME": "here",
                    "AWS_EXECUTION_ENV": "AWS_ECS_EC2",
                },
            )
            self.pods.append(pod)
            self.watch(pod, name, index, attempt)
            if pod.wait(job["Timeout"]["AttemptDurationSeconds"]) == 0:
                return {
                    "JobId": job_id,
                    "JobName": job["JobName"],
                    "Parameters": job["Parameters"],
                    "Status": "SUCCEEDED",
                    "StoppedAt": int(time.time() * 1000),
                }
        raise ExecutionFailed(f"{name}:\n{tail(pod.printed())}")


def _placed(state: Mapping[str, Any], data: Any, result: Any) -> Any:
    """What a state hands on: its result, in the place of its input or beside it, and of that a part."""
    path = state.get("ResultPath", "$")
    if path != "$":
        [key] = path.removeprefix("$.").split(".")
        result = {**data, key: result}
    return _select(state.get("OutputPath", "$"), result, {})


def _filled(template: Any, data: Any, context: Mapping[str, Any]) -> Any:
    """Parameters: a key that ends in `.$` has a path for its value."""
    if isinstance(template, Mapping):
        return {
            key.removesuffix(".$"): _select(value, data, context)
            if key.endswith(".$")
            else _filled(value, data, context)
            for key, value in template.items()
        }
    if isinstance(template, list):
        return [_filled(value, data, context) for value in template]
    return template


def _select(path: str, data: Any, context: Mapping[str, Any]) -> Any:
    root, path = (context, path[1:]) if path.startswith("$$") else (data, path)
    if path.startswith("$.['") and "," in path:
        # Several keys at once make an object of those that are there.
        keys = [key.strip().strip("'") for key in path.removeprefix("$.[").removesuffix("]").split(",")]
        return {key: root[key] for key in keys if key in root}
    found = [match.value for match in _parsed(path).find(root)]
    assert len(found) == 1, f"{path} has {len(found)} values in {json.dumps(root)[:500]}"
    return found[0]


def _parsed(path: str) -> Any:
    # Step Functions allows a dot before brackets.
    return jsonpath_ng.ext.parse(path.replace(".[", "["))
