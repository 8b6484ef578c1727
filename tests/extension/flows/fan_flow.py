"""Eight branches that want one snapshot at the same time."""

from pathlib import Path

from metaflow import FlowSpec, current, huggingface_hub, retry, step

from metaflow_hf.hub.snapshots import Snapshots

# Takeovers after three seconds instead of twenty.
Snapshots.__init__.__kwdefaults__["lease_seconds"] = 3.0


class FanFlow(FlowSpec):
    @step
    def start(self):
        self.parts = list(range(8))
        self.next(self.work, foreach="parts")

    @retry(times=1, minutes_between_retries=0)
    @huggingface_hub(load={"repo_id": "acme/sharded", "max_workers": 1})
    @step
    def work(self):
        self.files = {
            path.name: path.stat().st_size
            for path in Path(current.huggingface_hub.loaded["acme/sharded"]).iterdir()
        }
        self.next(self.join)

    @step
    def join(self, inputs):
        assert [branch.files == inputs[0].files for branch in inputs] == [True] * 8
        print(f"eight have {len(inputs[0].files)} files")
        self.next(self.end)

    @step
    def end(self):
        pass


if __name__ == "__main__":
    FanFlow()
