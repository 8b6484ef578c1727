"""Flows as people deploy them: `python flow.py argo-workflows create` and `trigger`, against servers on localhost."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import argo, step_functions
from .aws import Account
from .cluster import Cluster
from .images import Image
from .pods import Watch, ignore

# Whatever Argo tells process 1 to end, tells its shells as well, which would take the task with them.
LET_TASKS_END = "trap '' TERM"


@dataclass
class Deployments:
    """One user's directory, and the schedulers that this user deploys to."""

    directory: Path
    account: Account
    cluster: Cluster
    image: Image
    bucket: str
    environment: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        home = self.directory / "home"
        home.mkdir(parents=True)
        self.environment = {
            **{name: os.environ[name] for name in ("PATH", "LANG", "PYTHONPATH") if name in os.environ},
            **self.account.environment,
            **self.cluster.write_kubeconfig(home / "kubeconfig"),
            "HOME": str(home),
            "METAFLOW_USER": "tester",
            "METAFLOW_DATASTORE_SYSROOT_S3": self.bucket,
            "METAFLOW_KUBERNETES_CONTAINER_IMAGE": "registry/metaflow-hf",
            "METAFLOW_BATCH_CONTAINER_IMAGE": "registry/metaflow-hf",
            "METAFLOW_KUBERNETES_SANDBOX_INIT_SCRIPT": LET_TASKS_END,
            "METAFLOW_ARGO_EVENTS_EVENT": "metaflow-event",
            "METAFLOW_ARGO_EVENTS_EVENT_SOURCE": "argo-events-webhook",
            "METAFLOW_ARGO_EVENTS_SERVICE_ACCOUNT": "operate-workflow-sa",
        }

    def run(self, flow: Path, *arguments: str, python: str = sys.executable) -> tuple[int, str]:
        """One command of a flow; its exit status, and both streams in one."""
        done = subprocess.run(
            [python, str(flow), "--datastore=s3", *arguments],
            cwd=self.directory,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=200,
            check=False,
        )
        return done.returncode, done.stdout

    def succeed(self, flow: Path, *arguments: str, **settings: str) -> str:
        status, output = self.run(flow, *arguments, **settings)
        assert status == 0, output
        return output

    def template(self, name: str) -> dict[str, Any]:
        return self.cluster.of_kind("workflowtemplates")[name]

    def argo_workflow(self, name: str, watch: Watch = ignore, image: Image | None = None) -> argo.Workflow:
        """The workflow that was triggered last."""
        return argo.Workflow(
            self.template(name),
            self.cluster.submitted(),
            image or self.image,
            self.directory / "pods",
            self.role,
            watch,
        )

    def execution(self, name: str, watch: Watch = ignore) -> step_functions.Execution:
        """The execution that was triggered last."""
        machine = self.account.state_machine(name)
        client = self.account.client("stepfunctions")
        executions = client.list_executions(stateMachineArn=machine["stateMachineArn"])["executions"]
        newest = max(executions, key=lambda execution: execution["startDate"])
        given = client.describe_execution(executionArn=newest["executionArn"])["input"]
        return step_functions.Execution(
            json.loads(machine["definition"]),
            newest["name"],
            json.loads(given),
            self.image,
            self.directory / "pods",
            self.role,
            watch,
            self.account.client,
        )

    @property
    def role(self) -> Mapping[str, str]:
        """What every container has in its environment besides what Metaflow gives it."""
        return {**self.account.role, "METAFLOW_SKIP_INSTALL_DEPENDENCIES": "1", "OMP_NUM_THREADS": "1"}
