"""What one worker learned in a round, as tensors: three encodings, tensor by tensor.

``weights``    the parameters themselves: exact, for a round with one worker
``fp32``       parameters minus the base, in fp32
``int8/1024``  the same in blocks of 1024 values with one fp32 scale each: a quarter of the bytes, and no value
               off by more than half a step, 1/254 of the largest magnitude of its block
"""

from collections.abc import Iterator, Mapping
from typing import Final

import torch
from torch import Tensor

from metaflow_hf.errors import IntegrityError
from metaflow_hf.train.records import Encoding
from metaflow_hf.train.tensors import Layout, TensorReader

BLOCK: Final = 1024
_LEVELS: Final = 127
# Sorts directly behind the parameter's own name; no parameter's name holds a "#".
_SCALE: Final = "#scale"


def quantise(values: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values of the same shape and fp32 scales [num_blocks]; a block that is not finite gets such a scale."""
    flat = values.float().reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(dim=1) / _LEVELS
    steps = torch.where(scales > 0, scales, torch.ones_like(scales))
    quantised = (blocks / steps[:, None]).round().nan_to_num().clamp(-_LEVELS, _LEVELS).to(torch.int8)
    return quantised.view(-1)[: flat.numel()].view(values.shape), scales


def dequantise(quantised: Tensor, scales: Tensor) -> Tensor:
    """fp32 values of the shape of ``quantised``; the inverse of ``quantise`` up to its rounding."""
    flat = quantised.float().reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    return (blocks * scales[:, None]).view(-1)[: flat.numel()].view(quantised.shape)


def delta_layouts(shapes: Mapping[str, tuple[int, ...]], encoding: Encoding) -> dict[str, Layout]:
    """Which tensors a contribution of ``encoding`` consists of."""
    if encoding != "int8/1024":
        return {name: Layout(shape) for name, shape in shapes.items()}
    layouts = {}
    for name, shape in shapes.items():
        layouts[name] = Layout(shape, torch.int8)
        layouts[name + _SCALE] = Layout((-(-torch.Size(shape).numel() // BLOCK),))
    return layouts


def encode_delta(
    weights: Mapping[str, Tensor], base: TensorReader, encoding: Encoding
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a contribution, sorted by name; ``weights`` are on the CPU, in fp32."""
    for name in sorted(weights):
        if encoding == "weights":
            yield name, weights[name]
        elif encoding == "fp32":
            yield name, weights[name] - base[name]
        else:
            quantised, scales = quantise(weights[name] - base[name])
            yield name, quantised
            yield name + _SCALE, scales


def check_delta(reader: TensorReader, base: TensorReader, encoding: Encoding) -> None:
    """Raises ``IntegrityError`` unless the contribution has exactly the tensors that ``base`` asks for."""
    layouts = delta_layouts({name: base.shape(name) for name in base.names}, encoding)
    if reader.names != layouts.keys():
        odd = sorted(reader.names ^ layouts.keys())
        raise IntegrityError(f"tensors are missing or unknown: {', '.join(odd[:5])}")
    for name, layout in layouts.items():
        if reader.shape(name) != layout.shape:
            raise IntegrityError(f"{name} has shape {reader.shape(name)}, not {layout.shape}")


def decode_delta(reader: TensorReader, name: str, base: Tensor, encoding: Encoding) -> Tensor:
    """The change of one parameter in fp32; ``base`` is its value at the start of the round."""
    if encoding == "weights":
        return reader[name] - base
    if encoding == "fp32":
        return reader[name]
    return dequantise(reader[name], reader[name + _SCALE])
