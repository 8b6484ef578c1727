"""Flows deployed to schedulers on localhost, and executed in containers."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from metaflow import load_model
from s3_server import S3Server
from schedulers.aws import Account
from schedulers.cluster import Cluster, running_cluster
from schedulers.deployments import Deployments
from schedulers.images import Image
from schedulers.pods import require_namespaces
from soak.contents import Bucket

from metaflow_hf.demo.server import HubServer

ROOT = Path(__file__).parents[3]
FLOWS = ROOT / "flows"
TRAIN = FLOWS / "train_flow.py"

# A training of a dozen rounds in a few seconds: the containers around it take the time.
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


@pytest.fixture(scope="session")
def account(s3_server: S3Server) -> Account:
    return Account(s3_server).set_up()


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """What this project requires, without the project: it comes with the code package."""
    require_namespaces()
    return Image.with_our_requirements(tmp_path_factory.mktemp("image") / "python")


@pytest.fixture
def deployments(
    account: Account, cluster: Cluster, s3_server: S3Server, hub_server: HubServer, tmp_path: Path
) -> Callable[[Image], Deployments]:
    """A user's directory, with an empty bucket and the configuration `small.yaml`."""

    def make(image: Image) -> Deployments:
        made = Deployments(tmp_path / "project", account, cluster, image, s3_server.new_bucket())
        (made.directory / "small.yaml").write_text(SMALL.replace("{hub}", hub_server.url))
        return made

    return make


@dataclass(frozen=True)
class Trained:
    """What a training left in the bucket, read without the library."""

    contents: Bucket
    lineage: str
    directory: Path

    def rounds(self, check_lineage: Callable[[Path], list[dict]]) -> list[dict]:
        """All rounds; every position is in exactly one."""
        prefix = f"mf.hf/training/{self.lineage}/"
        for key in self.contents:
            if key == f"{prefix}spec.json" or key.startswith(f"{prefix}rounds/"):
                path = self.directory / key.removeprefix(prefix)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(self.contents[key])
        return check_lineage(self.directory)

    def model(self, run_id: str) -> str:
        """The key of the one model that a run made."""
        [key] = [key for key in self.contents if key.startswith(f"mf.hf/models/TrainFlow/{run_id}/merge/")]
        return key.removeprefix("mf.hf/")


@pytest.fixture
def trained(tmp_path: Path, s3_server: S3Server) -> Callable[[Deployments, str], Trained]:
    def find(deployed: Deployments, lineage: str) -> Trained:
        return Trained(Bucket(deployed.bucket, s3_server.url), lineage, tmp_path / "lineage")

    return find


@pytest.fixture
def loads(s3_environment, tmp_path: Path, monkeypatch) -> Callable[[Deployments, str], None]:
    """Checks that a model's key is enough to use it, here, where no flow runs."""

    def check(deployed: Deployments, key: str) -> None:
        from transformers import AutoModelForCausalLM

        from metaflow_hf.store import datastore

        monkeypatch.setenv("METAFLOW_HF_CACHE", str(tmp_path / "node-cache"))
        monkeypatch.setattr(datastore, "_active", ("s3", deployed.bucket))
        directory = Path(load_model(key))
        assert json.loads((directory / "config.json").read_text())["model_type"] == "llama"
        assert AutoModelForCausalLM.from_pretrained(directory).num_parameters() > 0

    return check
