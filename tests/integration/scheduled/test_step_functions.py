"""A flow on AWS Step Functions: deployed and triggered by its own commands, run job by job."""

import re

import pytest

from .conftest import PLAIN

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(1200)]


def test_a_flow_with_a_foreach_whose_join_gets_its_inputs_in_any_order(deployments, bare_image):
    deployed = deployments(bare_image)
    deployed.succeed(PLAIN, "step-functions", "create")
    deployed.succeed(PLAIN, "step-functions", "trigger", "--word", "it's; (fine)")
    execution = deployed.execution("PlainFlow")
    execution.run()
    printed = "\n".join(pod.printed() for pod in execution.pods)
    assert "squares [0, 1] ['a', 'b']" in printed
    # The join reads them from a set in DynamoDB, which has no order. Metaflow asks for this attribute alone, and moto makes a
    # Python set of what it projects: its order is that of the server's random hashes, so another in each run.
    assert re.search(r"order \[(0, 1|1, 0)\]", printed)
    assert 'word "it\'s; (fine)"' in printed
