"""A branch that is killed in its first attempt, a child process that saves, and a step that fails until resumed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from metaflow import FlowSpec, Parameter, checkpoint, current, retry, step

CHILD = """
from pathlib import Path
from metaflow import Checkpoint
with Checkpoint() as point:
    assert (Path(point.directory) / "progress").read_text() == "2"
    assert point.save(name="by.child", latest=False)["pathspec"] == {pathspec!r}
"""


class CheckpointFlow(FlowSpec):
    fail = Parameter("fail", default=False, type=bool)

    @step
    def start(self):
        self.parts = [{"lr": 0.1}, {1, 2}]
        self.next(self.train, foreach="parts")

    @retry(times=1, minutes_between_retries=0)
    @checkpoint
    @step
    def train(self):
        point = current.checkpoint
        progress = Path(point.directory, "progress")
        if current.retry_count == 0:
            assert not point.is_loaded
            assert point.info is None
            for done in (1, 2):
                progress.write_text(str(done))
                point.save(metadata={"done": done, "part": str(self.input)}, name=f"step.{done}")
            os.kill(os.getpid(), signal.SIGKILL)
        assert point.is_loaded
        assert point.info["name"] == "step.2"
        assert point.info["metadata"] == {"done": 2, "part": str(self.input)}
        assert progress.read_text() == "2"
        subprocess.run([sys.executable, "-c", CHILD.format(pathspec=current.pathspec)], check=True)
        assert [item["name"] for item in point.list()] == ["by.child", "step.2", "step.1"]
        assert [item["name"] for item in point.list(attempt=0, name="step.1")] == ["step.1"]
        assert len(point.list(full_namespace=True)) >= 3
        older = point.load(point.list(name="step.1")[0])
        assert Path(older, "progress").read_text() == "1"
        assert point.directory == older
        assert progress.read_text() == "2"
        Path(point.directory, "progress").write_text("3")
        self.last = point.save()
        self.next(self.join)

    @checkpoint(load_policy="eager", temp_dir_root="roots")
    @step
    def join(self, inputs):
        assert Path(current.checkpoint.load(inputs[1].last), "progress").read_text() == "3"
        self.merge_artifacts(inputs, include=["parts"])
        print(f"join began with {current.checkpoint.info and current.checkpoint.info['metadata']}")
        assert Path(current.checkpoint.directory).parent == Path("roots").absolute()
        Path(current.checkpoint.directory, "count").write_text(current.run_id)
        current.checkpoint.save(metadata={"run": current.run_id})
        self.next(self.end)

    @checkpoint
    @step
    def end(self):
        if current.origin_run_id is not None:
            assert Path(current.checkpoint.directory, "half").read_text() == "done"
            print(f"end goes on from {current.checkpoint.info['pathspec']}")
            return
        assert not current.checkpoint.is_loaded
        Path(current.checkpoint.directory, "half").write_text("done")
        current.checkpoint.save()
        if self.fail:
            raise RuntimeError("on purpose")


if __name__ == "__main__":
    CheckpointFlow()
