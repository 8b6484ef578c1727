"""A branch of a repository moves while the run uses it; foreach over values that are no names; one failure to resume."""

import os

from metaflow import FlowSpec, Parameter, checkpoint, current, huggingface_hub, retry, step

REPO = "acme/moving"
VALUES = [{"é/日本": [1, None]}, {"a", "set", "of", "names"}, "x" * 100_000, None]


class PinsFlow(FlowSpec):
    once = Parameter("once", default=False, type=bool)

    @huggingface_hub
    @step
    def start(self):
        self.first = current.huggingface_hub.snapshot_download(REPO)
        self.parts = VALUES[:1] if self.once else VALUES
        if not self.once:
            from huggingface_hub import HfApi

            api = HfApi(endpoint=os.environ["HF_ENDPOINT"], token="hf_owner")
            api.upload_file(path_or_fileobj=b"new", path_in_repo="new.txt", repo_id=REPO)
        self.next(self.branch, foreach="parts")

    @retry(times=1, minutes_between_retries=0)
    @checkpoint
    @huggingface_hub(load=REPO)
    @step
    def branch(self):
        assert self.input == self.parts[self.index]
        assert current.huggingface_hub.loaded.info[REPO]["commit_hash"] == self.first["commit_hash"]
        if current.retry_count == 0:
            current.checkpoint.save(__file__, metadata={"index": self.index})
            if isinstance(self.input, set):
                raise RuntimeError("on purpose")
        elif current.checkpoint.info["metadata"] != {"index": self.index}:
            raise AssertionError(current.checkpoint.info)
        self.identifier = current.checkpoint.list()[0]["key"].split("/")[4]
        self.next(self.join)

    @step
    def join(self, inputs):
        assert len({branch.identifier for branch in inputs}) == len(list(inputs))
        self.merge_artifacts(inputs, include=["first"])
        self.next(self.end)

    @huggingface_hub
    @step
    def end(self):
        if current.origin_run_id is None and not self.once:
            raise RuntimeError("on purpose")
        again = current.huggingface_hub.snapshot_download(REPO)
        assert again["commit_hash"] == self.first["commit_hash"]
        print(f"{current.run_id} has {again['commit_hash']} under {again['key']}")


if __name__ == "__main__":
    PinsFlow()
