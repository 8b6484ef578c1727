"""`@pinned_gpus`: what a branch sees before its Python starts."""

import os
import subprocess
import sys
from pathlib import Path

FLOW = Path(__file__).parent / "flows" / "pinned_flow.py"


def test_each_branch_sees_its_own_from_the_first_line_on(subprocess_environment, tmp_path: Path):
    done = subprocess.run(
        [sys.executable, FLOW, "run"],
        env={**subprocess_environment, "CUDA_VISIBLE_DEVICES": "GPU-a,3,GPU-c,5"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    for said in (
        "branch 0 sees GPU-a,3",
        "branch 1 sees GPU-c,5",
        "branch 2 sees GPU-a,3",
        "the end sees GPU-a,3,GPU-c,5",
    ):
        assert said in output


def test_a_number_that_is_none_is_refused_before_anything_runs(subprocess_environment, tmp_path: Path):
    flow = tmp_path / "flow.py"
    flow.write_text(FLOW.read_text().replace("per_branch=2", "per_branch=0"))
    done = subprocess.run(
        [sys.executable, flow, "show"],
        env={**os.environ, **subprocess_environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "@pinned_gpus of step 'work': per_branch=0 is no number of GPUs." in done.stdout + done.stderr
