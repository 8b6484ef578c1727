"""Which GPUs each branch sees, from the first line of its Python on."""

import os

# As torch would see it, had it been imported here.
SEEN = os.environ.get("CUDA_VISIBLE_DEVICES")

from metaflow import FlowSpec, pinned_gpus, step  # noqa: E402


class PinnedFlow(FlowSpec):
    @step
    def start(self):
        self.branches = [0, 1, 2]
        self.next(self.work, foreach="branches")

    @pinned_gpus(per_branch=2)
    @step
    def work(self):
        print(f"branch {self.input} sees {SEEN}")
        self.next(self.join)

    @step
    def join(self, inputs):
        self.next(self.end)

    @step
    def end(self):
        print(f"the end sees {SEEN}")


if __name__ == "__main__":
    PinnedFlow()
