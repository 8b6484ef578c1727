"""Speed and size of the hub cache against huggingface_hub, cp and, where named, metaflow-checkpoint, in one run.

    python tests/bench/hub.py [--megabytes 1024] [--repeat 3] [--only cold,revision,saves,tasks] [--rival PYTHON]

``--rival`` is the Python of another environment with metaflow-checkpoint (pip install metaflow-checkpoint
huggingface_hub): the same flows run there too. Everything comes from a hub on localhost in a process of its own;
each measurement begins with empty directories and a disk that has nothing left to write. Only what is named is timed:
no imports, no starting of processes, except in "added to a task". The order alternates, because a virtual machine may
give free memory back, and pays for getting it again: then believe the processor time and the later repetitions.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from parts import servers
from parts.report import scratch, settle, show, stored_bytes

PARTS = Path(__file__).parent / "parts"
ROOT = Path(__file__).parents[2]
TASKS = 4


class Place:
    """One user's empty machine: datastore, node cache, home and working directory below one directory."""

    def __init__(self, directory: Path, endpoint: str, python: str | None = None) -> None:
        self.directory = directory
        self.datastore = directory / "datastore"
        self.python = python or sys.executable
        self.results = directory / "results.jsonl"
        for name in ("datastore", "home", "work"):
            (directory / name).mkdir()
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
        self.environment = {
            **kept,
            "BENCH_RESULTS": str(self.results),
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(directory / "hf"),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HOME": str(directory / "home"),
            "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(self.datastore),
            "METAFLOW_HF_CACHE": str(directory / "node"),
            "METAFLOW_USER": "bench",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def run(self, *arguments: object, **environment: str) -> dict[str, float]:
        """Runs a Python script to its end; what it measured."""
        done = subprocess.run(
            [self.python, *map(str, arguments)],
            cwd=self.directory / "work",
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.exit(f"{' '.join(map(str, arguments))} failed:\n{done.stdout}")
        lines = self.results.read_text().splitlines() if self.results.exists() else []
        return {name: value for line in lines for name, value in json.loads(line).items()}

    def flow(self, name: str, **environment: str) -> dict[str, float]:
        return self.run(PARTS / name, "--no-pylint", "--quiet", "run", **environment)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", default="cold,revision,saves,tasks")
    parser.add_argument("--rival")
    parser.add_argument("--directory", help="where to work; its file system is what is measured")
    options = parser.parse_args()
    parts = options.only.split(",")
    directory = Path(tempfile.mkdtemp(prefix="bench-hub-", dir=options.directory))
    try:
        with servers.running("hub", options.megabytes, options.shards) as endpoint:
            print(
                f"{options.megabytes} MiB in {options.shards} shards, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
            )
            if "cold" in parts:
                _bench_cold(directory, endpoint, options.repeat, options.rival)
            if "revision" in parts:
                _bench_revision(directory, endpoint)
            if "saves" in parts:
                _bench_saves(directory, endpoint, options.megabytes, options.rival)
            if "tasks" in parts:
                _bench_tasks(directory, endpoint, options.repeat, options.rival)
    finally:
        shutil.rmtree(directory)


def _bench_cold(directory: Path, endpoint: str, repeat: int, rival: str | None) -> None:
    plain, ours, theirs = [], [], []
    for number in range(repeat):
        contenders = [(_plain, plain), (_big_flow, ours)]
        if rival:
            contenders.append((lambda place: _big_flow(place), theirs))
        # Nobody is always the first.
        for run, results in contenders[number % 2 :] + contenders[: number % 2]:
            with scratch(directory, "cold") as place:
                settle()
                results.append(run(Place(place, endpoint, rival if results is theirs else None)))
    cold = [run["cold"] for run in ours]
    show(
        "cold: download, verify, store and load, against snapshot_download and one durable copy",
        cold,
        [run["cold"] for run in plain],
        goal_ratio=1.2,
    )
    show("  against snapshot_download alone", cold, [run["download"] for run in plain])
    used = "cold, processor"
    show("  processor time of the two", [run[used] for run in ours], [run[used] for run in plain])
    show("warm: load what is on this node", [run["warm"] for run in ours], goal=0.1)
    if rival:
        show("  metaflow-checkpoint, cold (verifies nothing)", cold, [run["cold"] for run in theirs])
        show("  metaflow-checkpoint, warm", [run["warm"] for run in ours], [run["warm"] for run in theirs])


def _plain(place: Place) -> dict[str, float]:
    return place.run(PARTS / "plain.py", servers.REPO, place.directory, place.results)


def _big_flow(place: Place) -> dict[str, float]:
    return place.flow("big_flow.py", BENCH_REPO=servers.REPO)


def _bench_revision(directory: Path, endpoint: str) -> None:
    code = (
        "import sys; from metaflow_hf.hub import snapshot_download as get; "
        f"[get({servers.REPO!r}, revision=name) for name in sys.argv[1:]]"
    )
    with scratch(directory, "revision") as place:
        first = Place(place, endpoint)
        first.run("-c", code, "main")
        before = stored_bytes(first.datastore)
        first.run("-c", code, "v2")
        both = stored_bytes(first.datastore)
        unique = _unique_bytes(first.datastore)
    show(
        "stored bytes, one of the shards changed, against the unique bytes",
        [both / 1e6],
        [unique / 1e6],
        unit="MB",
        goal_ratio=1.01,
    )
    print(f"  main {before / 1e6:.3f} MB, both {both / 1e6:.3f} MB")


def _bench_saves(directory: Path, endpoint: str, megabytes: int, rival: str | None) -> None:
    stored = []
    for python in (None, rival) if rival else (None,):
        with scratch(directory, "saves") as place:
            model = place / "model"
            model.mkdir()
            with (model / "model.safetensors").open("wb") as file:
                for _ in range(megabytes):
                    file.write(os.urandom(1 << 20))
            own = Place(place, endpoint, python)
            taken = own.flow("big_flow.py", BENCH_SAVES="4", BENCH_DIRECTORY=str(model))
            stored.append(stored_bytes(own.datastore) / 1e6)
            names = ", ".join(f"{taken[f'save {number}']:.2f} s" for number in range(1, 5))
            print(
                f"four identical saves by {'metaflow-checkpoint' if python else 'ours'}: {names}", flush=True
            )
    show(
        "  stored bytes, against the model's",
        stored[:1],
        [megabytes * (1 << 20) / 1e6],
        unit="MB",
        goal_ratio=1.01,
    )
    if rival:
        show("  against metaflow-checkpoint", stored[:1], stored[1:], unit="MB")


def _unique_bytes(datastore: Path) -> int:
    import hashlib

    found = {}
    for path in datastore.rglob("*"):
        if path.is_file() and "blobs" in path.parts:
            with path.open("rb") as file:
                found[hashlib.file_digest(file, "sha256").digest()] = path.stat().st_size
    return sum(found.values())


def _bench_tasks(directory: Path, endpoint: str, repeat: int, rival: str | None) -> None:
    with scratch(directory, "tasks") as place:
        (place / "ours").mkdir()
        ours = _added_seconds(Place(place / "ours", endpoint), repeat)
        theirs = {}
        if rival:
            (place / "theirs").mkdir()
            theirs = _added_seconds(Place(place / "theirs", endpoint, rival), repeat)
    for name, (added, used) in ours.items():
        their_added, their_used = theirs.get(name, ((), ()))
        show(f"added to a task by a cached @{name}", added, their_added, goal=0.3)
        show("  processor time", used, their_used)


def _added_seconds(place: Place, repeat: int) -> dict[str, tuple[list[float], list[float]]]:
    """For each decorator what it adds to one task: seconds that pass, and seconds of a processor."""
    names = ("", "huggingface_hub", "model", "checkpoint")
    for name in names:  # caches the repository, and compiles what Python compiles once
        place.flow("task_flow.py", BENCH_REPO=servers.TINY_REPO, BENCH_DECORATOR=name)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for _ in range(repeat):
        for name, results in taken.items():
            began, used = time.perf_counter(), _processor_seconds()
            place.flow("task_flow.py", BENCH_REPO=servers.TINY_REPO, BENCH_DECORATOR=name)
            results.append((time.perf_counter() - began, _processor_seconds() - used))
    bare = [median(each) for each in zip(*taken[""], strict=True)]
    return {
        name: tuple([(each[which] - bare[which]) / TASKS for each in taken[name]] for which in (0, 1))
        for name in names[1:]
    }


def _processor_seconds() -> float:
    """What this process's ended children and theirs have used."""
    used = os.times()
    return used.children_user + used.children_system


if __name__ == "__main__":
    main()
