"""One step that asks for what the parameters say."""

from metaflow import FlowSpec, Parameter, current, huggingface_hub, step


class ParameterFlow(FlowSpec):
    repo_id = Parameter("repo_id", default="bert-base-uncased")
    revision = Parameter("revision", default="main")

    @huggingface_hub
    @step
    def start(self):
        self.reference = current.huggingface_hub.snapshot_download(self.repo_id, revision=self.revision)
        self.next(self.end)

    @step
    def end(self):
        print(f"got {self.reference['commit_hash']}")


if __name__ == "__main__":
    ParameterFlow()
