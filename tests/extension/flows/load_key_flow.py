"""Loads a model by the key that it is given, and a repository of the hub."""

import os

from metaflow import FlowSpec, Parameter, current, huggingface_hub, model, step


class LoadKeyFlow(FlowSpec):
    key = Parameter("key", default="")

    @huggingface_hub
    @model
    @step
    def start(self):
        if self.key:
            print(sorted(os.listdir(current.model.load(self.key))))
        else:
            self.saved = current.model.save(__file__, label="script")
            print(f"saved {self.saved['key']}")
            with current.huggingface_hub.load("gpt2", allow_patterns="*.json") as path:
                print(sorted(os.listdir(path)))
        self.next(self.end)

    @step
    def end(self):
        pass


if __name__ == "__main__":
    LoadKeyFlow()
