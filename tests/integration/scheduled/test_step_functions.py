"""A flow on AWS Step Functions: deployed and triggered by its own commands, run job by job."""

import re

import pytest

from .conftest import PLAIN

pytestmark = pytest.mark.timeout(1200)


def test_a_flow_with_a_foreach_whose_join_gets_its_inputs_in_any_order(deployments, bare_image):
    deployed = deployments(bare_image)
    deployed.succeed(PLAIN, "step-functions", "create")
    deployed.succeed(PLAIN, "step-functions", "trigger", "--word", "it's; (fine)")
    execution = deployed.execution("PlainFlow")
    execution.run()
    printed = "\n".join(pod.printed() for pod in execution.pods)
    assert "squares [0, 1] ['a', 'b']" in printed
    # The set that they come from has no order: the executor turns it around, the server may do so again.
    assert re.search(r"order \[(0, 1|1, 0)\]", printed)
    assert 'word "it\'s; (fine)"' in printed
