"""A step that comes back to itself, and fails in its second turn until resumed."""

from pathlib import Path

from metaflow import FlowSpec, checkpoint, current, step


class LoopFlow(FlowSpec):
    @step
    def start(self):
        self.turn = 0
        self.next(self.train)

    @checkpoint
    @step
    def train(self):
        self.turn += 1
        point = current.checkpoint
        print(f"turn {self.turn} began with {point.info and point.info['metadata']}")
        Path(point.directory, "progress").write_text(str(self.turn))
        point.save(metadata={"turn": self.turn})
        if self.turn == 2 and current.origin_run_id is None:
            raise RuntimeError("on purpose")
        self.go = "again" if self.turn < 3 else "done"
        self.next({"again": self.train, "done": self.end}, condition="go")

    @step
    def end(self):
        pass


if __name__ == "__main__":
    LoopFlow()
