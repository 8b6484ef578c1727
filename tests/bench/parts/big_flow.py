"""Downloads and loads a repository, loads it again, and saves equal files: the same lines under either library.

Appends its seconds to the file named by BENCH_RESULTS, one JSON object a line.
"""

import json
import os
import time
from contextlib import contextmanager

from metaflow import FlowSpec, current, huggingface_hub, model, step

REPO = os.environ.get("BENCH_REPO", "")
SAVES = int(os.environ.get("BENCH_SAVES", "0"))


@contextmanager
def timed(name):
    began, used = time.perf_counter(), time.process_time()
    yield
    results = {name: time.perf_counter() - began, f"{name}, processor": time.process_time() - used}
    with open(os.environ["BENCH_RESULTS"], "a") as file:
        file.write(json.dumps(results) + "\n")


class BigFlow(FlowSpec):
    @huggingface_hub
    @step
    def start(self):
        self.load("cold")
        self.next(self.again)

    @huggingface_hub
    @step
    def again(self):
        self.load("warm")
        self.next(self.save)

    @model
    @step
    def save(self):
        for number in range(SAVES):
            with timed(f"save {number + 1}"):
                current.model.save(os.environ["BENCH_DIRECTORY"], label="same")
        self.next(self.end)

    @step
    def end(self):
        pass

    def load(self, name):
        if not REPO:
            return
        # Both libraries import it when they need it, which is not what is measured.
        from huggingface_hub import snapshot_download  # noqa: F401

        loading = current.huggingface_hub.load(REPO)
        with timed(name):
            loading.__enter__()
        loading.__exit__(None, None, None)


if __name__ == "__main__":
    BigFlow()
