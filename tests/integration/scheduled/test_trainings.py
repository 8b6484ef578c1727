"""TrainFlow on Argo Workflows and on AWS Step Functions: deployed and triggered by its own commands, run container by
container. The second deployment joins the training of the first.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from schedulers.disturbances import Disturbances

from .conftest import TRAIN

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(1200)]
# Of the training, for both; the budget replaces what the configuration says.
TRIGGER = ("--lineage", "shared", "--max_tokens", "100000000")


def test_deployments_on_both_schedulers_train_one_model_while_containers_are_killed_and_evicted(
    deployments, image, trained, loads, check_lineage, tmp_path
):
    deployed = deployments(image)
    # Who is to be hurt while it trains has begun to; until then nobody may train the rest.
    first, second = begun = (threading.Event(), threading.Event())

    deployed.succeed(TRAIN, "--config", "config", "small.yaml", "argo-workflows", "create")
    output = deployed.succeed(TRAIN, "argo-workflows", "trigger", *TRIGGER)
    pods = Disturbances()
    # Nobody else can know that it is gone: without its retry they would wait until its heartbeat was still for a minute.
    pods.when("train", 0, 0, r"step \d+", lambda pod: pod.kill())
    pods.hold("train", 0, 1, r"step \d+", begun)
    pods.when("train", 1, 0, r"step \d+", lambda _: first.set())
    pods.hold("train", 1, 0, r"step \d+", begun)
    pods.when("train", 1, 0, r"round \d+: ", lambda pod: pod.evict(grace_seconds=60))
    workflow = deployed.argo_workflow("trainflow", pods.watch)
    assert workflow.run_id in output

    deployed.succeed(TRAIN, "--config", "config", "small.yaml", "step-functions", "create")
    deployed.succeed(TRAIN, "step-functions", "trigger", *TRIGGER)
    jobs = Disturbances()
    jobs.when("train", 0, 0, r"step \d+", lambda pod: pod.kill())
    jobs.hold("train", 0, 1, r"step \d+", begun)
    jobs.when("train", 1, 0, r"step \d+", lambda _: second.set())
    jobs.hold("train", 1, 0, r"step \d+", begun)
    jobs.when("train", 1, 0, r"round \d+: ", lambda pod: pod.evict(grace_seconds=60, notice=True))
    execution = deployed.execution("TrainFlow", jobs.watch)

    with ThreadPoolExecutor() as pool:
        for done in [pool.submit(run.run) for run in (workflow, execution)]:
            done.result()
    pods.check()
    jobs.check()

    printed = {pod.root.name: pod.printed() for pod in workflow.pods}
    assert {"train-0-1", "train-1-1"} <= set(printed)
    assert "it was told to stop. What was finished is published" in printed["train-1-0"]
    found = trained(deployed, "shared")
    rounds = check_lineage(found.download(tmp_path / "lineage"))
    contributors = {accepted["attempt"] for manifest in rounds for accepted in manifest["accepted"]}
    # One of each deployment at least: a container that is tried again may find everything trained.
    assert len(contributors) >= 2
    # Both end with the one model, whoever exported it.
    assert found.model() in printed["end-0-0"]
    assert found.model() in execution.pods[-1].printed()
    loads(deployed, found.model())
