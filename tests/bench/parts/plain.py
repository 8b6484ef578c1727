"""What one would write without a cache, as a process: huggingface_hub's own download and one durable copy of it.

python plain.py REPO DIRECTORY RESULTS

Appends the seconds of both to the file RESULTS, one JSON object a line. Imports are not counted.
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path

from huggingface_hub import snapshot_download


def main(repo_id: str, directory: str, results: str) -> None:
    began, used = time.perf_counter(), time.process_time()
    snapshot = Path(snapshot_download(repo_id, cache_dir=Path(directory, "hub")))
    downloaded = time.perf_counter() - began
    target = Path(directory, "copy")
    for file in snapshot.rglob("*"):
        if file.is_file():
            place = target / file.relative_to(snapshot)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)
            with place.open("rb+") as written:
                os.fsync(written.fileno())
    whole, used = time.perf_counter() - began, time.process_time() - used
    with open(results, "a") as file:
        file.write(json.dumps({"download": downloaded, "cold": whole, "cold, processor": used}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
