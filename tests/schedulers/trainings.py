"""A training that is small enough to be mostly containers, and what it leaves behind, read without the library."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# {hub}: where model and dataset come from.
SMALL = """
hub: "{hub}"
model: {repo_id: metaflow-hf/tiny-llama, dtype: float32}
data:
  dataset: hf://metaflow-hf/python-docs
  max_samples: 64
  heldout_samples: 4
  samples_per_block: 50
  dataset_chunk_size: 20
  sequence_length: 128
  batch_size: 4
rounds: {workers: 2, claim_samples: 4, seconds: 0.2}
evaluation: {max_samples: 4, prompts: [], max_new_tokens: 1}
report: {interval_seconds: 0.1}
resources: {gpu: 0, cpu: 1, memory: 2048}
"""


@dataclass(frozen=True)
class Trained:
    """One lineage and its models in a bucket."""

    contents: Mapping[str, bytes]
    lineage: str

    def download(self, directory: Path) -> Path:
        """Specification and rounds, as they lie on a disk."""
        prefix = f"mf.hf/training/{self.lineage}/"
        for key in self.contents:
            if key == f"{prefix}spec.json" or key.startswith(f"{prefix}rounds/"):
                path = directory / key.removeprefix(prefix)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(self.contents[key])
        return directory

    def read(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The specification, and the rounds in order."""
        prefix = f"mf.hf/training/{self.lineage}/"
        rounds = sorted(key for key in self.contents if key.startswith(f"{prefix}rounds/"))
        return json.loads(self.contents[f"{prefix}spec.json"]), [
            json.loads(self.contents[key]) for key in rounds
        ]

    def model(self) -> str:
        """The key of the one model that the lineage became."""
        prefix = f"mf.hf/training/{self.lineage}/exports/"
        [record] = [key for key in self.contents if key.startswith(prefix)]
        return str(json.loads(self.contents[record])["key"])
