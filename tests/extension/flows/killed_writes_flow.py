"""All three decorators in one step, whose first attempts are killed one write later each."""

import os
import signal
import threading
from pathlib import Path

from metaflow import FlowSpec, Parameter, checkpoint, current, huggingface_hub, model, retry, step

from metaflow_hf.hub.snapshots import Snapshots
from metaflow_hf.store.obstore_backend import ObstoreBackend

# A killed download is taken over sooner.
Snapshots.__init__.__kwdefaults__["lease_seconds"] = 1.0
WRITES = ("create", "put", "upload", "take", "delete")


writes = []


def die_at(n):
    """This process is killed around its n-th write of the library: before it when n is odd, after it when even."""

    def mortal(write):
        def wrapped(*arguments, **keywords):
            if threading.current_thread().name.startswith("lease "):
                return write(*arguments, **keywords)
            writes.append(write.__name__)
            is_last = len(writes) == n
            if is_last and n % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            answer = write(*arguments, **keywords)
            if is_last:
                os.kill(os.getpid(), signal.SIGKILL)
            return answer

        return wrapped

    for name in WRITES:
        setattr(ObstoreBackend, name, mortal(getattr(ObstoreBackend, name)))


class KilledWritesFlow(FlowSpec):
    kills = Parameter("kills", default="")

    @retry(times=4, minutes_between_retries=0)
    @checkpoint
    @model
    @huggingface_hub
    @step
    def start(self):
        kills = [int(n) for n in self.kills.split(",") if n]
        attempt = current.retry_count
        die_at(kills[attempt] if attempt < len(kills) else 0)
        before = current.checkpoint.info
        version = before["version"] if before else 0
        state = Path(current.checkpoint.directory, "state")
        # Each checkpoint is whole: its content is its version.
        assert not before or state.read_text() == f"version {version} " * 1000
        self.base = current.huggingface_hub.snapshot_download("gpt2", allow_patterns=["*.json", "*.safetensors"])
        state.write_text(f"version {version + 1} " * 1000)
        current.checkpoint.save()
        self.saved = current.model.save(current.checkpoint.directory, label="final")
        print(f"attempt {attempt} ended after {len(writes)} writes")
        self.next(self.end)

    @model(load=["base", "saved"])
    @step
    def end(self):
        loaded = current.model.loaded
        assert Path(loaded["base"], "config.json").exists()
        assert Path(loaded["base"], "model.safetensors").stat().st_size
        words = Path(loaded["saved"], "state").read_text()
        print(f"in the end: {words[:9]}")


if __name__ == "__main__":
    KilledWritesFlow()
