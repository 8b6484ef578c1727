"""``pytorch_model.bin`` without torch: the zip of a pickle and raw storages that ``torch.load`` reads.

Written opcode by opcode, because pickling torch's classes by name would import torch; so the bytes are also
the same whatever torch is installed.
"""

import io
import pickle
import struct
import zipfile

import numpy as np

from metaflow_hf.demo.tiny_models import Weights

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip can say


def pickle_file(weights: Weights) -> bytes:
    """The float32 weights as one state dict."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        entries = {"data.pkl": _state_dict(weights), "byteorder": b"little", "version": b"3\n"}
        entries |= {f"data/{i}": w.astype("<f4").tobytes() for i, w in enumerate(weights.values())}
        for name, data in entries.items():
            archive.writestr(zipfile.ZipInfo(f"pytorch_model/{name}", _EPOCH), data)
    return buffer.getvalue()


def _state_dict(weights: Weights) -> bytes:
    items = b"".join(_text(name) + _tensor(i, w) for i, (name, w) in enumerate(weights.items()))
    return pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS + pickle.STOP


def _tensor(key: int, weight: np.ndarray) -> bytes:
    """``_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)``."""
    storage = _tuple(
        _text("storage"), _global("torch", "FloatStorage"), _text(str(key)), _text("cpu"), _int(weight.size)
    )
    strides = [s // weight.itemsize for s in np.ascontiguousarray(weight).strides]
    hooks = _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    arguments = _tuple(
        storage + pickle.BINPERSID,
        _int(0),
        _tuple(*map(_int, weight.shape)),
        _tuple(*map(_int, strides)),
        pickle.NEWFALSE,
        hooks,
    )
    return _global("torch._utils", "_rebuild_tensor_v2") + arguments + pickle.REDUCE


def _tuple(*items: bytes) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE


def _text(text: str) -> bytes:
    data = text.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(data)) + data


def _int(number: int) -> bytes:
    return pickle.BININT + struct.pack("<i", number)


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()
