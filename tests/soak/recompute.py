"""Every round of a training made again from what the workers published, by code that is not the library's.

The oracle of the outer step is ``torch.optim.SGD(nesterov=True)``. Positions, tokens, digests and the chain are
checked by the auditor of the simulation.
"""

import hashlib
import json
import struct
from collections.abc import Mapping

import numpy as np
import torch
from simulation.audit import Auditor, Manifest, expand

DTYPES = {"F32": np.float32, "I8": np.int8}
INT8_BLOCK = 1024


class RecomputingAuditor(Auditor):
    """The auditor of a lineage that keeps everything (``rounds.keep: all``)."""

    def __init__(self, num_positions: int, *, learning_rate: float = 0.7, momentum: float = 0.6) -> None:
        super().__init__(num_positions)
        self._settings = {"lr": learning_rate, "momentum": momentum}
        self._parameters: dict[str, torch.nn.Parameter] = {}
        self._outer: torch.optim.SGD | None = None

    def check_weights(self, number: int, manifest: Manifest, objects: Mapping[str, bytes]) -> None:
        content = objects[manifest["weights"]["key"]]
        assert hashlib.sha256(content).hexdigest() == manifest["weights"]["digest"]
        weights = read_tensors(content)
        if number == 0:
            self._parameters = {n: torch.nn.Parameter(torch.from_numpy(w)) for n, w in weights.items()}
            self._outer = torch.optim.SGD(self._parameters.values(), nesterov=True, **self._settings)
            return
        self._advance(number, manifest, objects)
        for name, parameter in self._parameters.items():
            expected = parameter.detach().numpy()
            assert np.allclose(weights[name], expected, rtol=1e-5, atol=1e-6), f"round {number}: {name}"
            with torch.no_grad():
                # Rounding must not add up over hundreds of rounds.
                parameter.copy_(torch.from_numpy(weights[name]))

    def _advance(self, number: int, manifest: Manifest, objects: Mapping[str, bytes]) -> None:
        changes = []
        for item in manifest["accepted"]:
            record = objects[f"deltas/{number - 1:010d}/{item['attempt']}.json"]
            assert hashlib.sha256(record).hexdigest() == item["delta_digest"]
            delta = json.loads(record)
            assert delta["base"] == self.digests[number - 1]
            assert expand(delta["positions"]) == expand(item["positions"])
            changes.append(
                (item["tokens"], delta["encoding"], read_tensors(objects[delta["tensors"]["key"]]))
            )
        if not changes:
            return
        if len(changes) == 1 and changes[0][1] == "weights":
            with torch.no_grad():
                for name, parameter in self._parameters.items():
                    parameter.copy_(torch.from_numpy(changes[0][2][name]))
            return
        total = sum(tokens for tokens, _, _ in changes)
        for name, parameter in self._parameters.items():
            mean = sum(
                (tokens / total) * decode(tensors, name, encoding, parameter.detach().numpy())
                for tokens, encoding, tensors in changes
            )
            parameter.grad = -torch.from_numpy(np.asarray(mean, np.float32))
        assert self._outer is not None
        self._outer.step()


def decode(tensors: dict[str, np.ndarray], name: str, encoding: str, base: np.ndarray) -> np.ndarray:
    """The change of one parameter."""
    values = tensors[name]
    if encoding == "fp32":
        return values
    if encoding == "weights":
        return values - base
    scales = np.repeat(tensors[f"{name}#scale"], INT8_BLOCK)[: values.size]
    return (values.reshape(-1).astype(np.float32) * scales).reshape(values.shape)


def read_tensors(content: bytes) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file, read by the format's specification."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        values = np.frombuffer(content[start:stop], DTYPES[entry["dtype"]])
        tensors[name] = values.reshape(entry["shape"]).copy()
    return tensors
