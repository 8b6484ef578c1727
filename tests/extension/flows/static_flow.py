import os

from metaflow import FlowSpec, current, huggingface_hub, step


class SimpleHFFlow(FlowSpec):
    @huggingface_hub(load=["bert-base-uncased"])
    @step
    def start(self):
        # Access the loaded model through current.huggingface_hub.loaded
        model_path = current.huggingface_hub.loaded["bert-base-uncased"]
        print(f"Model loaded at: {model_path}")
        print(f"Contents: {os.listdir(model_path)}")
        self.next(self.load_to_path)

    @huggingface_hub(load=[("bert-base-uncased", "./model_directory")])
    @step
    def load_to_path(self):
        # Access the loaded model through current.huggingface_hub.loaded
        model_path = current.huggingface_hub.loaded["bert-base-uncased"]
        print(f"Model loaded at: {model_path}")
        print(f"Contents: {os.listdir(model_path)}")
        self.next(self.end)

    @huggingface_hub(
        load=[
            {
                "repo_id": "bert-base-uncased",
                "allow_patterns": ["*.json", "tokenizer.txt"],
                "repo_type": "model",
            },
        ]
    )
    @step
    def end(self):
        # Access the loaded model through current.huggingface_hub.loaded
        model_path = current.huggingface_hub.loaded["bert-base-uncased"]
        print(f"Model loaded at: {model_path}")
        print(f"Contents: {os.listdir(model_path)}")


if __name__ == "__main__":
    SimpleHFFlow()
