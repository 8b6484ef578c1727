"""Trainings on both schedulers whose containers are hurt at random: killed, evicted, frozen, in any step, any attempt."""

import random
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from s3_server import running_s3_server
from schedulers.aws import Account
from schedulers.cluster import running_cluster
from schedulers.deployments import Deployments
from schedulers.images import Image
from schedulers.pods import Pod
from schedulers.trainings import SMALL, Trained

from metaflow_hf.demo.server import HubServer
from metaflow_hf_cli.fixtures import fixture_content

from .contents import Bucket

TRAIN = Path(__file__).parents[2] / "flows" / "train_flow.py"
ATTEMPTS = 4


class Hurting:
    """Hurts two of three containers, each a random time after it started; never the last attempt of a task."""

    def __init__(self, rng: random.Random) -> None:
        self.done = Counter[str]()
        self._rng = rng
        self._lock = threading.Lock()

    def watch(self, pod: Pod, step: str, index: int, attempt: int) -> None:
        with self._lock:
            how = self._rng.choice(["kill", "evict", "notice", "freeze", "", ""])
            pause = self._rng.expovariate(1 / 10)
        if how and attempt + 1 < ATTEMPTS:
            threading.Thread(target=self._hurt, args=(pod, how, pause), daemon=True).start()

    def _hurt(self, pod: Pod, how: str, pause: float) -> None:
        time.sleep(pause)
        if not pod.is_running():
            return
        self.done[how] += 1
        if how == "kill":
            pod.kill()
        elif how == "freeze":
            with pod.frozen():
                time.sleep(pause)
        else:
            pod.evict(grace_seconds=20, notice=how == "notice")


def soak(seed: int) -> Counter[str]:
    """One training on each scheduler; raises unless every position is in the model exactly once."""
    done = Counter[str]()
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
        server = stack.enter_context(running_s3_server())
        hub = stack.enter_context(HubServer(fixture_content()))
        cluster = stack.enter_context(running_cluster())
        account = Account(server).set_up()
        image = Image.with_our_requirements(root / "image")
        for number, scheduler in enumerate(("argo-workflows", "step-functions")):
            bucket = server.new_bucket()
            deployed = Deployments(root / scheduler, account, cluster, image, bucket)
            (deployed.directory / "small.yaml").write_text(SMALL.replace("{hub}", hub.url))
            options = ["--config", "config", "small.yaml", "--with", f"retry:times={ATTEMPTS - 1}"]
            deployed.succeed(TRAIN, *options, scheduler, "create")
            deployed.succeed(TRAIN, scheduler, "trigger", "--lineage", "soak")
            hurting = Hurting(random.Random(seed + number))
            run = (
                deployed.argo_workflow("trainflow", hurting.watch)
                if scheduler == "argo-workflows"
                else deployed.execution("TrainFlow", hurting.watch)
            )
            run.run()
            _check(Trained(Bucket(bucket, server.url), "soak"))
            done += hurting.done
    return done


def _check(trained: Trained) -> None:
    spec, rounds = trained.read()
    seen = [
        position
        for manifest in rounds
        for accepted in manifest["accepted"]
        for start, stop in accepted["positions"]
        for position in range(start, stop)
    ]
    assert sorted(seen) == list(range(spec["num_positions"])), sorted(seen)
    assert rounds[-1]["final"]
    assert trained.model()
