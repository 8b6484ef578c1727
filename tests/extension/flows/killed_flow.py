"""All three decorators in two steps, of which the first is killed in its first attempt."""

import os
import signal
from pathlib import Path

from metaflow import FlowSpec, checkpoint, current, huggingface_hub, model, retry, step


class KilledFlow(FlowSpec):
    @retry(times=1, minutes_between_retries=0)
    @checkpoint
    @huggingface_hub
    @step
    def start(self):
        self.base = current.huggingface_hub.snapshot_download("gpt2", allow_patterns="*.json")
        state = Path(current.checkpoint.directory, "state")
        if current.retry_count == 0:
            state.write_text("half")
            current.checkpoint.save()
            os.kill(os.getpid(), signal.SIGKILL)
        print(f"goes on from {state.read_text()}")
        self.next(self.end)

    @model(load="base")
    @step
    def end(self):
        assert Path(current.model.loaded["base"], "config.json").exists()
        self.saved = current.model.save(current.model.loaded["base"])


if __name__ == "__main__":
    KilledFlow()
