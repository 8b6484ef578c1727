"""Leaves a model under the name by which other flows look for one."""

from pathlib import Path

from metaflow import FlowSpec, current, model, step


class SavedFlow(FlowSpec):
    @model
    @step
    def start(self):
        Path("weights.txt").write_text("as good as any")
        self.model = current.model.save("weights.txt", label="tiny")
        self.next(self.end)

    @step
    def end(self):
        print("key", self.model["key"])


if __name__ == "__main__":
    SavedFlow()
