"""A token where it should not be."""

from metaflow import FlowSpec, current, huggingface_hub, step


class TokenFlow(FlowSpec):
    @huggingface_hub(load={"repo_id": "acme/gated-model", "token": "hf_reader"})
    @step
    def start(self):
        print(f"files: {current.huggingface_hub.loaded.info['acme/gated-model']['num_files']}")
        self.next(self.end)

    @step
    def end(self):
        pass


if __name__ == "__main__":
    TokenFlow()
