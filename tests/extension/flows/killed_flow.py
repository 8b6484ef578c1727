"""All three decorators in two steps, of which the first is killed in its first attempt."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from metaflow import FlowSpec, checkpoint, current, huggingface_hub, model, retry, step


class KilledFlow(FlowSpec):
    @retry(times=1, minutes_between_retries=0)
    @checkpoint
    @huggingface_hub
    @step
    def start(self):
        self.base = current.huggingface_hub.snapshot_download("gpt2", allow_patterns="*.json")
        if current.retry_count == 0:
            Path(current.checkpoint.directory, "state").write_text("half")
            current.checkpoint.save()
            os.kill(os.getpid(), signal.SIGKILL)
        print(f"goes on from {Path(current.checkpoint.directory, 'state').read_text()}")
        child = "from metaflow import Checkpoint; print('child saved', Checkpoint().save(name='by.child')['version'])"
        subprocess.run([sys.executable, "-c", child], check=True)
        self.next(self.end)

    @model(load="base")
    @step
    def end(self):
        assert Path(current.model.loaded["base"], "config.json").exists()
        self.saved = current.model.save(current.model.loaded["base"])


if __name__ == "__main__":
    KilledFlow()
