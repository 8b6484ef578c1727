"""TrainFlow on Argo Workflows: deployed and triggered by its own commands, run container by container."""

import pytest
from schedulers.disturbances import Disturbances

from .conftest import TRAIN

pytestmark = pytest.mark.timeout(1200)


def test_a_training_goes_on_when_pods_are_killed_and_evicted(
    deployments, image, trained, loads, check_lineage, tmp_path
):
    deployed = deployments(image)
    deployed.succeed(TRAIN, "--config", "config", "small.yaml", "argo-workflows", "create")
    output = deployed.succeed(TRAIN, "argo-workflows", "trigger", "--max_tokens", "100000000")
    faults = Disturbances()
    # Nobody else can know that it is gone: without its retry they would wait until its heartbeat was still for a minute.
    faults.when("train", 0, 0, r"step \d+", lambda pod: pod.kill())
    faults.when("train", 1, 0, r"round \d+: ", lambda pod: pod.evict(grace_seconds=60))
    workflow = deployed.argo_workflow("trainflow", faults.watch)
    assert workflow.run_id in output
    workflow.run()
    faults.check()

    printed = {pod.root.name: pod.printed() for pod in workflow.pods}
    assert {"train-0-1", "train-1-1"} <= set(printed)
    assert "it was told to stop. What was finished is published" in printed["train-1-0"]
    found = trained(deployed, f"TrainFlow-{workflow.run_id}")
    rounds = check_lineage(found.download(tmp_path / "lineage"))
    contributors = {accepted["attempt"] for manifest in rounds for accepted in manifest["accepted"]}
    assert len(contributors) >= 2
    assert found.model() in printed["end-0-0"]
    loads(deployed, found.model())
