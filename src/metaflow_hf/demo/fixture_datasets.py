"""Small datasets for tests: each file format, several configurations, and modalities to search by."""

import csv
import functools
import gzip
import io
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from metaflow_hf.demo.content import HubContent

PARQUET_ID = "acme/parquet"
GZIP_ID = "acme/jsonl-gz"
CSV_ID = "acme/csv"
PLAIN_TEXT_ID = "acme/txt"
CHAT_ID = "acme/chat"
CONFIGS_ID = "acme/two-configs"
BLANK_ROWS_ID = "acme/blank-rows"
ONE_PART_ID, CANONICAL_ID = "imdb", "stanfordnlp/imdb"  # as on the real hub, a redirect
GATED_DATASET_ID = "acme/gated-data"
PRIVATE_DATASET_ID = "acme/private-data"

NUM_ROWS = 240  # of each, in all shards together
_WORDS = ("block", "chunk", "claim", "round", "worker", "model", "token", "batch", "hub", "cache", "store")

Row = Mapping[str, Any]
Build = Callable[[], dict[str, bytes]]


def rows(seed: int, count: int = NUM_ROWS) -> list[dict[str, Any]]:
    """Rows with ``id`` and ``text``, the same for the same seed."""
    chance = random.Random(seed)
    return [
        {"id": i, "text": f"{i}: " + " ".join(chance.choices(_WORDS, k=chance.randint(5, 40)))}
        for i in range(count)
    ]


def add_datasets(content: HubContent) -> None:
    """Add every dataset of this module to ``content``."""
    builders: dict[str, tuple[Build, str]] = {
        PARQUET_ID: (_parquet, "parquet"),
        GZIP_ID: (_gzip, "json"),
        CSV_ID: (_csv, "csv"),
        PLAIN_TEXT_ID: (_plain_text, "text"),
        CHAT_ID: (_chat, "json"),
        CONFIGS_ID: (_two_configs, "json"),
        BLANK_ROWS_ID: (_blank_rows, "json"),
        ONE_PART_ID: (_labelled, "parquet"),
        GATED_DATASET_ID: (_gzip, "json"),
        PRIVATE_DATASET_ID: (_gzip, "json"),
    }
    for popularity, (repo_id, (build, file_format)) in enumerate(builders.items(), start=1):
        content.add(
            repo_id,
            build,
            repo_type="dataset",
            gated=repo_id == GATED_DATASET_ID,
            private=repo_id == PRIVATE_DATASET_ID,
            tags=("modality:text", f"format:{file_format}", "language:en"),
            downloads=10 * popularity,
        )
    content.rename(ONE_PART_ID, CANONICAL_ID, repo_type="dataset")
    for modality, name in _OTHER_MODALITIES:
        content.add(
            f"acme/{name}",
            functools.partial(_media, modality, name),
            repo_type="dataset",
            tags=(f"modality:{modality}",),
        )


_OTHER_MODALITIES: Sequence[tuple[str, str]] = (
    ("image", "photos"),
    ("image", "drawings"),
    ("audio", "speech"),
    ("audio", "birdsong"),
    ("video", "clips"),
    ("document", "scanned-letters"),
    ("tabular", "measurements"),
    ("timeseries", "temperatures"),
    ("geospatial", "maps"),
    ("3d", "shapes"),
)


def _halves(items: Sequence[Row]) -> tuple[Sequence[Row], Sequence[Row]]:
    return items[: len(items) // 2], items[len(items) // 2 :]


def _jsonl(items: Iterable[Row]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in items).encode()


def _parquet_file(items: Sequence[Row], rows_per_group: int) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    buffer = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(list(items)), buffer, row_group_size=rows_per_group)
    return buffer.getvalue()


def _parquet() -> dict[str, bytes]:
    first, second = _halves(rows(1))
    return {
        "data/train-00000-of-00002.parquet": _parquet_file(first, rows_per_group=40),
        "data/train-00001-of-00002.parquet": _parquet_file(second, rows_per_group=40),
        "data/test-00000-of-00001.parquet": _parquet_file(rows(101, 30), rows_per_group=40),
    }


def _gzip() -> dict[str, bytes]:
    first, second = _halves(rows(2))
    return {
        "data/train-00000-of-00002.jsonl.gz": gzip.compress(_jsonl(first), mtime=0),
        "data/train-00001-of-00002.jsonl.gz": gzip.compress(_jsonl(second), mtime=0),
    }


def _csv() -> dict[str, bytes]:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, ["id", "text"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows(3))
    return {"train.csv": file.getvalue().encode()}


def _plain_text() -> dict[str, bytes]:
    return {"train.txt": "".join(f"{row['text']}\n" for row in rows(4)).encode()}


def _chat() -> dict[str, bytes]:
    messages = [
        {
            "messages": [
                {"role": "user", "content": f"Say: {row['text']}"},
                {"role": "assistant", "content": row["text"]},
            ]
        }
        for row in rows(5)
    ]
    return {"data/train-00000-of-00001.jsonl": _jsonl(messages)}


def _two_configs() -> dict[str, bytes]:
    header = (
        "---\nconfigs:\n"
        "- config_name: english\n  default: true\n  data_files:\n"
        "  - split: train\n    path: english/train.jsonl\n  - split: validation\n    path: english/validation.jsonl\n"
        "- config_name: french\n  data_files:\n  - split: train\n    path: french/train.jsonl\n---\n"
    )
    return {
        "README.md": f"{header}# Two configurations\n".encode(),
        "english/train.jsonl": _jsonl(rows(6)),
        "english/validation.jsonl": _jsonl(rows(106, 30)),
        "french/train.jsonl": _jsonl(rows(7, 60)),
    }


def _blank_rows() -> dict[str, bytes]:
    """Every seventh row is blank, every eleventh has no text at all; the rest are as usual."""
    mixed: list[Row] = [
        {"id": row["id"], "text": None}
        if i % 11 == 3
        else {"id": row["id"], "text": " "}
        if i % 7 == 2
        else row
        for i, row in enumerate(rows(8))
    ]
    return {"data/train-00000-of-00001.jsonl": _jsonl(mixed)}


def _labelled() -> dict[str, bytes]:
    labelled = [{"text": row["text"], "label": row["id"] % 2} for row in rows(9)]
    return {
        "plain_text/train-00000-of-00001.parquet": _parquet_file(labelled, rows_per_group=100),
        "plain_text/test-00000-of-00001.parquet": _parquet_file(labelled[:40], rows_per_group=100),
    }


def _media(modality: str, name: str) -> dict[str, bytes]:
    content = random.Random(name).randbytes(3000)
    suffix = {"image": "png", "audio": "wav", "video": "mp4", "document": "pdf"}.get(modality, "bin")
    return {"README.md": f"# {name}\n".encode(), f"data/0.{suffix}": content}
