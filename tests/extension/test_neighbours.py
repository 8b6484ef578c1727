"""Installed beside metaflow-checkpoint, which gives the same names."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

OTHER = "metaflow-checkpoint"

FLOW = """
from metaflow import Checkpoint, FlowSpec, checkpoint, current, huggingface_hub, load_model, model, step


class BesideFlow(FlowSpec):
    @checkpoint
    @huggingface_hub
    @step
    def start(self):
        self.base = current.huggingface_hub.snapshot_download("gpt2", allow_patterns="*.json")
        current.checkpoint.save(__file__)
        answering = {type(current.checkpoint), type(current.huggingface_hub), type(Checkpoint())}
        assert {kind.__module__.partition(".")[0] for kind in answering} == {"metaflow_hf"}
        assert load_model.__module__.startswith("metaflow_extensions.hf."), load_model.__module__
        self.next(self.end)

    @model(load="base")
    @step
    def end(self):
        assert type(current.model).__module__.startswith("metaflow_hf.")
        import metaflow_extensions.obcheckpoint
        print(f"loaded {sorted(current.model.loaded)} beside {metaflow_extensions.obcheckpoint.__name__}")


if __name__ == "__main__":
    BesideFlow()
"""


@pytest.fixture
def beside(tmp_path: Path) -> str:
    """The interpreter of an environment that has everything of this one, and metaflow-checkpoint."""
    place = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(place), "platbase": str(place)}))
    # `addsitedir` reads .pth files too, so that an editable installation of this package counts.
    Path(site, "whole.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    installed = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"),
            *("--retries=1", "--timeout=15", f"--target={site}", OTHER),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if installed.returncode != 0:
        reason = (installed.stderr.strip().splitlines() or ["no reason given"])[-1]
        pytest.skip(f"{OTHER} cannot be installed from the package index: {reason}")
    return str(place / "bin" / "python")


def test_ours_answers_beside_the_other_and_the_user_is_told_once(beside, run_flow, project: Path):
    flow = project / "beside.py"
    flow.write_text(FLOW)
    outcome = run_flow(flow, python=beside, PYTHONPATH="")
    assert outcome.status == 0, outcome.output
    [line] = outcome.lines(f"{OTHER} ", "is installed too")
    assert all(name in line for name in ("@checkpoint", "@huggingface_hub", "@model", "metaflow-hf's"))
    assert os.sep not in line.partition("is installed too")[2]
    assert outcome.lines("loaded ['base'] beside metaflow_extensions.obcheckpoint")
