"""What the leader of a worker tells its followers: a method of their engines and its arguments, as msgpack."""

import dataclasses
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import torch

from metaflow_hf.data.batches import Batch


def encode_call(method: str, arguments: Sequence[Any]) -> bytes:
    """A call of ``method``; arguments may be numbers, texts, paths, batches, ``None``, and sequences of these."""
    return msgspec.msgpack.encode((method, [_plain(value) for value in arguments]))


def next_call(pipe: Connection) -> tuple[str, tuple[Any, ...]] | None:
    """Waits for the next call; ``None`` when there will be none."""
    try:
        method, arguments = msgspec.msgpack.decode(pipe.recv_bytes())
    except EOFError:
        return None
    return method, tuple(map(_restored, arguments))


def _plain(value: Any) -> Any:
    """An argument as msgpack has it: tensors as lists, batches and paths by their names."""
    if isinstance(value, Batch):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {"batch": {name: _plain(item) for name, item in fields.items()}}
    if isinstance(value, torch.Tensor):
        return {"tensor": value.tolist()}
    if isinstance(value, Path):
        return {"path": str(value)}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _restored(value: Any) -> Any:
    if isinstance(value, list):
        return [_restored(item) for item in value]
    match value:
        case {"batch": fields}:
            return Batch(**{name: _restored(item) for name, item in fields.items()})
        case {"tensor": items}:
            return torch.tensor(items, dtype=torch.long)
        case {"path": text}:
            return Path(text)
    return value
