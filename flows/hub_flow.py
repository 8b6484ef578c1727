"""Caches a repository of the hub in the flow's datastore and loads it in the next step.

python flows/hub_flow.py run                    a tiny model from a hub on localhost: needs no network
python flows/hub_flow.py run --repo_id gpt2     from the real hub; a second run downloads nothing
"""

from pathlib import Path

from metaflow import FlowSpec, Parameter, current, huggingface_hub, model, step

from metaflow_extensions.hf import parameters as types

EMBEDDED_MODEL = "metaflow-hf/tiny-llama"


class HubFlow(FlowSpec):
    """The smallest use: a repository passed as a parameter, cached once, loaded wherever it is needed."""

    repo_id = Parameter(
        "repo_id", type=types.repo_id, default=EMBEDDED_MODEL, help="The repository, as owner/name."
    )
    revision = Parameter("revision", type=types.revision, default="main", help="Branch, tag or commit.")

    @huggingface_hub
    @step
    def start(self):
        """Downloads what no one downloaded before; the reference is a small dict that any flow can load by."""
        self.snapshot = current.huggingface_hub.snapshot_download(
            repo_id=self.repo_id,
            revision=self.revision,
            endpoint="embedded" if self.repo_id == EMBEDDED_MODEL else None,
        )
        self.next(self.end)

    @model(load="snapshot")
    @step
    def end(self):
        """Finds the files in a directory of its own."""
        directory = Path(current.model.loaded["snapshot"])
        print(f"{self.repo_id} at commit {self.snapshot['commit_hash'][:12]}, loaded to {directory}:")
        for file in sorted(directory.rglob("*")):
            if file.is_file():
                print(f"{file.relative_to(directory)!s:<30} {file.stat().st_size:>12,} bytes")


if __name__ == "__main__":
    HubFlow()
