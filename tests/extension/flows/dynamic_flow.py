import os

from metaflow import FlowSpec, current, huggingface_hub, model, step


class SimpleHFFlow(FlowSpec):
    @huggingface_hub
    @step
    def start(self):
        # Download a small model from HuggingFace Hub
        self.hf_model_reference = current.huggingface_hub.snapshot_download(
            repo_id="bert-base-uncased",
            allow_patterns=["*.json"],  # Only download the config file to keep it light
        )
        print("Model Reference saved with key : %s" % self.hf_model_reference["key"])  # noqa: UP031  as documented
        self.next(self.end)

    @model(load="hf_model_reference")
    @step
    def end(self):
        print(f"Model loaded at: {current.model.loaded['hf_model_reference']}")
        print(f"Contents: {os.listdir(current.model.loaded['hf_model_reference'])}")


if __name__ == "__main__":
    SimpleHFFlow()
