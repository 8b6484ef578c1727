"""Two steps of which the first four attempts are killed at one of their writes each."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from metaflow import FlowSpec, Parameter, checkpoint, current, huggingface_hub, model, retry, step

from metaflow_hf.hub.snapshots import Snapshots
from metaflow_hf.store.obstore_backend import ObstoreBackend

# A killed download is taken over sooner.
Snapshots.__init__.__kwdefaults__["lease_seconds"] = 1.0
# Which argument of a write is its key.
KEY_OF = {"create": 1, "put": 1, "upload": 2, "take": 2, "delete": 1}
CHILD = "from metaflow import Checkpoint; print('child saved', Checkpoint().save(name='by.child')['version'])"


def die(when, prefix):
    """This process is killed before (or after) its first write of the library to a key that begins with `prefix`."""

    def mortal(write, position):
        def wrapped(*arguments, **keywords):
            is_it = arguments[position].startswith(f"{prefix}/")
            if is_it and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            answer = write(*arguments, **keywords)
            if is_it:
                os.kill(os.getpid(), signal.SIGKILL)
            return answer

        return wrapped

    for name, position in KEY_OF.items():
        setattr(ObstoreBackend, name, mortal(getattr(ObstoreBackend, name), position))


class KilledWritesFlow(FlowSpec):
    kills = Parameter("kills", help="of both steps: 'after blobs,before manifests'")

    def may_die(self):
        kills = self.kills.split(",")[0 if current.step_name == "start" else 4 :][:4]
        if current.retry_count < len(kills):
            die(*kills[current.retry_count].split())

    @retry(times=4, minutes_between_retries=0)
    @huggingface_hub
    @step
    def start(self):
        self.may_die()
        self.base = current.huggingface_hub.snapshot_download(
            "gpt2", allow_patterns=["*.json", "*.safetensors"]
        )
        self.next(self.work)

    @retry(times=4, minutes_between_retries=0)
    @checkpoint
    @model
    @step
    def work(self):
        self.may_die()
        before = current.checkpoint.info
        version = before["version"] if before else 0
        state = Path(current.checkpoint.directory, "state")
        # Each checkpoint is whole: its content is its version.
        assert not before or state.read_text() == f"version {version} " * 1000
        state.write_text(f"version {version + 1} " * 1000)
        current.checkpoint.save()
        self.saved = current.model.save(current.checkpoint.directory, label="final")
        subprocess.run([sys.executable, "-c", CHILD], check=True)
        self.next(self.end)

    @model(load=["base", "saved"])
    @step
    def end(self):
        loaded = current.model.loaded
        assert Path(loaded["base"], "config.json").exists()
        assert Path(loaded["base"], "model.safetensors").stat().st_size
        words = Path(loaded["saved"], "state").read_text()
        print(f"in the end: {words[:9]} of {self.saved['key']}")


if __name__ == "__main__":
    KilledWritesFlow()
