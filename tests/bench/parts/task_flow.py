"""Four tasks that do nothing, each under the decorator that BENCH_DECORATOR names: what does it add to a task?"""

import os

from metaflow import FlowSpec, checkpoint, huggingface_hub, model, step

DECORATOR = os.environ.get("BENCH_DECORATOR", "")
REPO = os.environ["BENCH_REPO"]


def decorated(function):
    if DECORATOR == "huggingface_hub":
        return huggingface_hub(load=[REPO])(function)
    if DECORATOR == "model":
        return model(function)
    if DECORATOR == "checkpoint":
        return checkpoint(function)
    return function


class TaskFlow(FlowSpec):
    @decorated
    @step
    def start(self):
        self.next(self.second)

    @decorated
    @step
    def second(self):
        self.next(self.third)

    @decorated
    @step
    def third(self):
        self.next(self.end)

    @decorated
    @step
    def end(self):
        pass


if __name__ == "__main__":
    TaskFlow()
