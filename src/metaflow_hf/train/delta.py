"""What one worker learned in a round, as tensors: three encodings, tensor by tensor.

``weights``    the parameters themselves: exact, for a round with one worker
``fp32``       parameters minus the base, in fp32
``int8/1024``  the same in blocks of 1024 values with one fp32 scale each: a quarter of the bytes, and no value
               off by more than half a step, 1/254 of the largest magnitude of its block

Values are handled in slabs that stay in the processor's cache; every operation is one per value, so the result
does not depend on where slabs end.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Final

import torch
from torch import Tensor

from metaflow_hf.errors import IntegrityError
from metaflow_hf.train.records import Encoding
from metaflow_hf.train.tensors import Layout, TensorReader

BLOCK: Final = 1024
# Values handled at a time: whole blocks.
SLAB: Final = 128 * BLOCK
_LEVELS: Final = 127
# Sorts directly behind the parameter's own name; no parameter's name holds a "#".
_SCALE: Final = "#scale"

# The change of values [start, start + len(base)) of one parameter in fp32, given their value at the round's start.
Decode = Callable[[int, Tensor], Tensor]


def quantise(values: Tensor, base: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """int8 values of the same shape and fp32 scales [num_blocks]; a block that is not finite gets such a scale.

    With ``base`` it is ``values - base`` that is quantised.
    """
    flat = values.reshape(-1)
    minus = None if base is None else base.reshape(-1)
    quantised = torch.empty(flat.numel(), dtype=torch.int8)
    scales = torch.empty(_num_blocks(flat.numel()))
    for start in range(0, flat.numel(), SLAB):
        slab = flat[start : start + SLAB].float()
        stop = start + len(slab)
        slab = slab.clone() if minus is None else slab - minus[start:stop]
        if len(slab) % BLOCK:
            slab = torch.nn.functional.pad(slab, (0, -len(slab) % BLOCK))
        blocks = slab.view(-1, BLOCK)
        scale = torch.maximum(blocks.amax(dim=1), -blocks.amin(dim=1)).div_(_LEVELS)
        blocks.div_(torch.where(scale > 0, scale, 1.0)[:, None]).round_()
        if not bool(torch.isfinite(scale).all()):
            blocks.nan_to_num_().clamp_(-_LEVELS, _LEVELS)
        quantised[start:stop] = slab[: stop - start]
        scales[start // BLOCK : _num_blocks(stop)] = scale
    return quantised.view(values.shape), scales


def dequantise(quantised: Tensor, scales: Tensor) -> Tensor:
    """fp32 values of the shape of ``quantised``; the inverse of ``quantise`` up to its rounding."""
    values = quantised.reshape(-1).float()
    whole = values.numel() - values.numel() % BLOCK
    values[:whole].view(-1, BLOCK).mul_(scales[: whole // BLOCK, None])
    if whole < values.numel():
        values[whole:].mul_(scales[-1])
    return values.view(quantised.shape)


def delta_layouts(shapes: Mapping[str, tuple[int, ...]], encoding: Encoding) -> dict[str, Layout]:
    """Which tensors a contribution of ``encoding`` consists of."""
    if encoding != "int8/1024":
        return {name: Layout(shape) for name, shape in shapes.items()}
    layouts = {}
    for name, shape in shapes.items():
        layouts[name] = Layout(shape, torch.int8)
        layouts[name + _SCALE] = Layout((_num_blocks(torch.Size(shape).numel()),))
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
            quantised, scales = quantise(weights[name], base[name])
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


def decoder(reader: TensorReader, name: str, encoding: Encoding) -> Decode:
    """What decodes slabs of one parameter's change; slabs begin at multiples of ``SLAB``."""
    values = reader[name].reshape(-1)
    if encoding == "weights":
        return lambda start, base: values[start : start + len(base)] - base
    if encoding == "fp32":
        return lambda start, base: values[start : start + len(base)]
    scales = reader[name + _SCALE]

    def decode(start: int, base: Tensor) -> Tensor:
        stop = start + len(base)
        return dequantise(values[start:stop], scales[start // BLOCK : _num_blocks(stop)])

    return decode


def slabs(tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The values of a tensor, in order, as slabs and where each begins; at least one, which may be empty."""
    flat = tensor.reshape(-1)
    for start in range(0, max(flat.numel(), 1), SLAB):
        yield start, flat[start : start + SLAB]


def decode_delta(reader: TensorReader, name: str, base: Tensor, encoding: Encoding) -> Tensor:
    """The whole change of one parameter in fp32; ``base`` is its value at the start of the round."""
    decode = decoder(reader, name, encoding)
    return torch.cat([decode(start, slab) for start, slab in slabs(base)]).view(base.shape)


def _num_blocks(num_values: int) -> int:
    return -(-num_values // BLOCK)
