"""Flows deployed to schedulers on localhost, and executed in containers."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from metaflow import load_model
from s3_server import S3Server
from schedulers.aws import Account
from schedulers.cluster import Cluster, running_cluster
from schedulers.deployments import Deployments
from schedulers.images import Image
from schedulers.pods import require_namespaces
from schedulers.trainings import SMALL, Trained
from soak.contents import Bucket

from metaflow_hf.demo.server import HubServer

ROOT = Path(__file__).parents[3]
FLOWS = ROOT / "flows"
TRAIN = FLOWS / "train_flow.py"
# Uses nothing of this project.
PLAIN = Path(__file__).parent / "flows" / "plain_flow.py"


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


@pytest.fixture(scope="session")
def bare_image(tmp_path_factory) -> Image:
    """An image of any kind, in which Metaflow installs what it needs itself."""
    require_namespaces()
    return Image.build(tmp_path_factory.mktemp("bare") / "python")


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


@pytest.fixture
def trained(s3_server: S3Server) -> Callable[[Deployments, str], Trained]:
    def find(deployed: Deployments, lineage: str) -> Trained:
        return Trained(Bucket(deployed.bucket, s3_server.url), lineage)

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
