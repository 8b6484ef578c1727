"""Speed of the store's own objects against boto3 and cp, in one run: models saved, and loaded by an empty node.

    python tests/bench/objects.py [--megabytes 1024] [--shards 4] [--repeat 3] [--latency 0.0]

S3 is a directory served by a process of its own (``--latency``: seconds before each answer). Clients are made and
used once before the clock starts.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from parts import servers
from parts.report import scratch, seconds, settle, show, stored_bytes

from metaflow_hf.references import ModelRef
from metaflow_hf.store import ObjectStore, open_store
from metaflow_hf.store.blobs import hash_file
from metaflow_hf.store.models import load_directory, save_directory
from metaflow_hf.store.node_cache import NodeCache

BUCKET, PREFIX = "bench", "metaflow/mf.hf"
TASK = {"flow": "Bench", "run": "1", "step": "start", "task": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--latency", type=float, default=0.0)
    parser.add_argument("--directory", help="where to work; its file system is what is measured")
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="bench-objects-", dir=options.directory))
    try:
        size = options.megabytes << 20
        model = _make_model(directory / "model", size, options.shards)
        print(
            f"{options.megabytes} MiB in {options.shards} files, {os.cpu_count()} cores, "
            f"load {os.getloadavg()[0]:.1f}"
        )
        with servers.running("s3", directory / "buckets", options.latency) as endpoint:
            _bench_disk(directory, model, size, options.repeat)
            _bench_s3(directory, model, endpoint, options.repeat)
    finally:
        shutil.rmtree(directory)


def _make_model(place: Path, size: int, files: int) -> Path:
    place.mkdir()
    for number in range(files):
        with (place / f"model-{number + 1:05d}.safetensors").open("wb") as file:
            for _ in range(size // files >> 20):
                file.write(os.urandom(1 << 20))
    return place


def _bench_disk(directory: Path, model: Path, size: int, repeat: int) -> None:
    saved, copied = _in_turns(
        directory,
        repeat,
        lambda place: save_directory(open_store(place / "store"), model, **TASK),
        lambda place: _durable_copy(model, place / "copied"),
    )
    show("save to a datastore on disk, against one durable copy", saved, copied)
    with scratch(directory, "disk") as disk:
        store, cache = open_store(disk / "store"), NodeCache(disk / "node")
        reference = save_directory(store, model, **TASK)
        again = [seconds(save_directory, store, model, **TASK) for _ in range(3)]
        show("  save the same again (reads and hashes)", again)
        show(
            "stored bytes of four identical saves, against the model's",
            [stored_bytes(disk / "store") / 1e6],
            [size / 1e6],
            unit="MB",
            goal_ratio=1.01,
        )
        _check(load_directory(store, reference, cache=cache), model)
        loaded, cloned = _in_turns(
            directory,
            repeat,
            lambda place: load_directory(store, reference, place / "loaded", cache=cache),
            lambda place: subprocess.run(["cp", "-r", model, place / "cp"], check=True),
        )
        show("warm load to a path of one's own, against cp -r", loaded, cloned)


def _in_turns(directory: Path, repeat: int, *contenders: Callable[[Path], object]) -> list[list[float]]:
    """Seconds of each contender in an empty directory, ``repeat`` times; nobody is always the first."""
    taken: list[list[float]] = [[] for _ in contenders]
    for number in range(repeat):
        for turn in range(len(contenders)):
            which = (turn + number) % len(contenders)
            with scratch(directory, "turn") as place:
                settle()
                taken[which].append(seconds(contenders[which], place))
    return taken


def _bench_s3(directory: Path, model: Path, endpoint: str, repeat: int) -> None:
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id="key",
        aws_secret_access_key="secret",
        region_name="us-east-1",
        config=Config(max_pool_connections=64),
    )
    options = {
        "endpoint": endpoint,
        "access_key_id": "key",
        "secret_access_key": "secret",
        "region": "us-east-1",
        "virtual_hosted_style_request": False,
        "client_options": {"allow_http": True},
    }
    store = open_store(f"s3://{BUCKET}/{PREFIX}", backend_options=options)
    (directory / "buckets" / BUCKET).mkdir(parents=True)
    threads = TransferConfig(max_concurrency=8)
    bucket = directory / "buckets" / BUCKET

    def emptied(work: Callable[[], object]) -> None:
        work()
        shutil.rmtree(bucket)
        bucket.mkdir()

    uploaded, sent = _in_turns(
        directory,
        repeat,
        lambda _: emptied(lambda: save_directory(store, model, **TASK)),
        lambda _: emptied(lambda: _send(client, model, threads)),
    )
    reference = save_directory(store, model, **TASK)
    keys = [info.key for info in store.list("blobs")]
    _receive(client, keys[:1], directory, threads)  # opens connections
    loaded, to_path, received = _in_turns(
        directory,
        repeat,
        lambda place: _load(store, reference, place, model),
        lambda place: _load(store, reference, place, model, place / "path"),
        lambda place: _receive(client, keys, place, threads),
    )
    show("S3: save, against boto3 with 8 threads", uploaded, sent)
    show(
        "S3: load by an empty node, verified, against boto3 with 8 threads", loaded, received, goal_ratio=1.0
    )
    show("S3: the same to a path of one's own (writable copies), against boto3", to_path, received)
    show(
        "  sha256 of the same bytes by one thread", [seconds(lambda: [hash_file(p) for p in model.iterdir()])]
    )


def _load(
    store: ObjectStore, reference: ModelRef, place: Path, model: Path, target: Path | None = None
) -> None:
    _check(load_directory(store, reference, target, cache=NodeCache(place / "node")), model)


def _check(loaded: Path, model: Path) -> None:
    found = {path.name: path.stat().st_size for path in loaded.iterdir()}
    if found != {path.name: path.stat().st_size for path in model.iterdir()}:
        sys.exit(f"{loaded} is not the model")


def _send(client: object, model: Path, threads: TransferConfig) -> None:
    for path in sorted(model.iterdir()):
        client.upload_file(str(path), BUCKET, f"boto3/{path.name}", Config=threads)


def _receive(client: object, keys: list[str], place: Path, threads: TransferConfig) -> None:
    for number, key in enumerate(keys):
        client.download_file(BUCKET, f"{PREFIX}/{key}", str(place / str(number)), Config=threads)


def _durable_copy(model: Path, place: Path) -> None:
    shutil.copytree(model, place, copy_function=shutil.copyfile)
    for path in place.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())


if __name__ == "__main__":
    main()
