"""The state of a worker's own optimiser as tensors, so that training goes on where it stopped.

AdamW keeps two moments per parameter and a count of steps. Randomness needs no state: every claim is trained
with a generator seeded by the run's seed and its position (see ``trainer``).
"""

from collections.abc import Iterator, Mapping
from typing import Final

import torch
from torch import Tensor, nn

from metaflow_hf.train.tensors import Layout, TensorReader

_KINDS: Final = ("exp_avg", "exp_avg_sq", "step")


def inner_layouts(parameters: Mapping[str, nn.Parameter]) -> dict[str, Layout]:
    """Which tensors the inner state of these parameters consists of."""
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    return {
        f"{kind}/{name}": Layout(() if kind == "step" else shape)
        for kind in _KINDS
        for name, shape in shapes.items()
    }


def inner_tensors(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> Iterator[tuple[str, Tensor]]:
    """The inner state, sorted by name; zeros for parameters that never had a gradient."""
    for name, layout in sorted(inner_layouts(parameters).items()):
        kind, _, parameter = name.partition("/")
        value = optimizer.state.get(parameters[parameter], {}).get(kind)
        yield name, torch.zeros(layout.shape) if value is None else value.float()


def load_inner(
    reader: TensorReader, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Replaces the optimiser's state by a stored one."""
    optimizer.state.clear()
    for name, parameter in parameters.items():
        step = reader[f"step/{name}"]
        if step == 0:
            continue
        moments = {kind: reader[f"{kind}/{name}"].to(parameter.device) for kind in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": step.clone(), **moments}
