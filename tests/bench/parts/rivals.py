"""What other libraries need for the same rows, each in an environment of its own.

python rivals.py NAME RAW DIRECTORY STARTS    NAME: litdata, mosaicml-streaming or datasets

Converts the lines of RAW, reads the 4,000 rows from each of STARTS (JSON) on, then all rows in order, as far as it
comes in 30 s; prints the seconds of converting, of a chunk and of a row in order as JSON. It imports nothing of ours.
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

CHUNK = 4000
PATIENCE_SECONDS = 30


class LitData:
    def __init__(self, raw: Path, directory: Path) -> None:
        from litdata import StreamingDataset
        from litdata.streaming.cache import Cache

        cache = Cache(str(directory), chunk_size=CHUNK)
        for number, row in enumerate(rows_of(raw)):
            cache[number] = row
        cache.done()
        cache.merge()
        self._dataset = StreamingDataset(str(directory), shuffle=False)

    def chunk(self, start: int) -> list[str]:
        return [self._dataset[number]["text"] for number in range(start, start + CHUNK)]

    def everything(self) -> Iterator[str]:
        return (row["text"] for row in self._dataset)


class Mosaic:
    def __init__(self, raw: Path, directory: Path) -> None:
        # Pictures, which would need a torchvision that fits PyTorch, are not what is measured.
        sys.modules["streaming.vision"] = ModuleType("streaming.vision")
        from streaming import MDSWriter, StreamingDataset

        columns = {"id": "int", "text": "str", "source": "str"}
        with MDSWriter(out=str(directory), columns=columns) as out:
            for row in rows_of(raw):
                out.write({name: row[name] for name in columns})
        self._dataset = StreamingDataset(local=str(directory), shuffle=False, batch_size=1)

    def chunk(self, start: int) -> list[str]:
        return [self._dataset[number]["text"] for number in range(start, start + CHUNK)]

    def everything(self) -> Iterator[str]:
        return (row["text"] for row in self._dataset)


class Datasets:
    def __init__(self, raw: Path, directory: Path) -> None:
        from datasets import Dataset

        self._dataset = Dataset.from_json(str(raw), cache_dir=str(directory))

    def chunk(self, start: int) -> list[str]:
        return self._dataset[start : start + CHUNK]["text"]

    def everything(self) -> Iterator[str]:
        for start in range(0, len(self._dataset), CHUNK):
            yield from self._dataset[start : start + CHUNK]["text"]


RIVALS = {"litdata": LitData, "mosaicml-streaming": Mosaic, "datasets": Datasets}


def rows_of(raw: Path) -> Iterator[dict]:
    with raw.open() as lines:
        yield from map(json.loads, lines)


def main(name: str, raw: str, directory: str, starts: str) -> None:
    began = time.perf_counter()
    rival = RIVALS[name](Path(raw), Path(directory))
    built = time.perf_counter()
    rival.chunk(0)
    opened = time.perf_counter()
    for start in json.loads(starts):
        assert len(rival.chunk(start)) == CHUNK
    random_read = time.perf_counter()
    count = 0
    for count, _ in enumerate(rival.everything(), 1):
        if count % CHUNK == 0 and time.perf_counter() - random_read > PATIENCE_SECONDS:
            break
    ended = time.perf_counter()
    figures = {
        "convert": built - began,
        "chunk": (random_read - opened) / len(json.loads(starts)),
        "row": (ended - random_read) / count,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:])
