"""A token where it should not be, and one where it should."""

from metaflow import FlowSpec, card, current, huggingface_hub, step


class TokenFlow(FlowSpec):
    @huggingface_hub(load={"repo_id": "acme/gated-model", "token": "hf_reader"})
    @step
    def start(self):
        print(f"files: {current.huggingface_hub.loaded.info['acme/gated-model']['num_files']}")
        self.next(self.end)

    @card
    @huggingface_hub
    @step
    def end(self):
        # By the token of the environment.
        self.reference = current.huggingface_hub.snapshot_download("acme/private-model")


if __name__ == "__main__":
    TokenFlow()
