"""TrainFlow on AWS Step Functions: deployed and triggered by its own commands, run job by job."""

import threading

import pytest
from schedulers.disturbances import Disturbances
from schedulers.pods import Pod

from .conftest import PLAIN, TRAIN

pytestmark = pytest.mark.timeout(1200)


def test_a_flow_with_a_foreach_whose_join_gets_its_inputs_in_another_order(deployments, bare_image):
    deployed = deployments(bare_image)
    deployed.succeed(PLAIN, "step-functions", "create")
    deployed.succeed(PLAIN, "step-functions", "trigger", "--word", "it's; (fine)")
    execution = deployed.execution("PlainFlow")
    execution.run()
    printed = "\n".join(pod.printed() for pod in execution.pods)
    assert "squares [0, 1] ['a', 'b']" in printed
    assert "order [1, 0]" in printed
    assert 'word "it\'s; (fine)"' in printed


def test_a_second_deployment_joins_a_training_whose_jobs_are_killed_and_evicted(
    deployments, image, trained, loads, check_lineage, tmp_path
):
    deployed = deployments(image)
    deployed.succeed(TRAIN, "--config", "config", "small.yaml", "step-functions", "create")
    deployed.succeed(TRAIN, "step-functions", "trigger", "--lineage", "shared")
    joined = threading.Event()

    def wait_for_the_other(pod: Pod) -> None:
        with pod.frozen():
            assert joined.wait(300), "the second execution does not train"

    faults = Disturbances()
    faults.when("train", 0, 0, r"step \d+", lambda pod: pod.kill())
    faults.when("train", 1, 0, r"step \d+", wait_for_the_other)
    faults.when("train", 1, 0, r"round \d+: ", lambda pod: pod.evict(grace_seconds=60, notice=True))
    first = deployed.execution("TrainFlow", faults.watch)

    deployed.succeed(TRAIN, "step-functions", "trigger", "--lineage", "shared", "--num_gpus", "1")
    arrivals = Disturbances()
    arrivals.when("train", 0, 0, r"step \d+", lambda _: joined.set())
    second = deployed.execution("TrainFlow", arrivals.watch)

    failures = []

    def run(execution) -> None:
        try:
            execution.run()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(execution,)) for execution in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    faults.check()
    arrivals.check()

    found = trained(deployed, "shared")
    rounds = check_lineage(found.download(tmp_path / "lineage"))
    contributors = {accepted["attempt"] for manifest in rounds for accepted in manifest["accepted"]}
    # One of each execution at least: a job that is tried again may find everything trained.
    assert len(contributors) >= 2
    # Both end with the one model, whoever exported it.
    for execution in (first, second):
        assert found.model() in execution.pods[-1].printed()
    loads(deployed, found.model())
