"""The state of a worker's own optimiser as tensors, so that training goes on where it stopped.

AdamW keeps two moments per parameter and a count of steps, the one of 8 bits their scales as well; training in fp16
has a loss scale. Randomness needs no state: every claim is trained with a generator seeded by the run's seed and its
position (see ``trainer``).
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from metaflow_hf.store.objects import Digest
from metaflow_hf.train.sharding import is_part, part_like, whole
from metaflow_hf.train.tensors import Layout, TensorReader, write_tensors

_SCALER: Final = "loss_scale"
_TRACKER: Final = "loss_scale_tracker"


def write_inner(
    path: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None = None,
) -> Digest:
    """Writes the state of this moment as ``kind/parameter``; parameters that never had a gradient have none."""
    tensors = dict(sorted(inner_tensors(parameters, optimizer, scaler)))
    layouts = {name: Layout(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    return write_tensors(path, layouts, tensors.items())


def read_inner(
    reader: TensorReader,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None = None,
) -> None:
    """Replaces the optimiser's state by a stored one."""
    found: dict[str, dict[str, Tensor]] = {}
    for key in reader.names - {_SCALER, _TRACKER}:
        kind, _, name = key.partition("/")
        found.setdefault(name, {})[kind] = reader[key]
    optimizer.state.clear()
    for name, parameter in parameters.items():
        state = found.get(name)
        if state is None or state["step"] == 0:
            continue
        moments = {
            kind: part_like(parameter, value)
            if value.shape == parameter.shape
            else value.to(parameter.device)
            for kind, value in state.items()
            if kind != "step"
        }
        optimizer.state[parameter] = {"step": _step(optimizer, state["step"], parameter), **moments}
    if scaler is not None and _SCALER in reader.names:
        scaler.load_state_dict(
            {
                **scaler.state_dict(),
                "scale": float(reader[_SCALER]),
                "_growth_tracker": int(reader[_TRACKER]),
            }
        )


def inner_tensors(
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """The state by name; of parts that several processes hold the whole, on the host, for which all have to ask."""
    for name, parameter in parameters.items():
        for kind, value in optimizer.state.get(parameter, {}).items():
            tensor = value if isinstance(value, Tensor) else torch.tensor(float(value))
            gathered = whole(tensor.detach())
            yield f"{kind}/{name}", gathered.cpu() if is_part(tensor) else gathered
    if scaler is not None:
        state = scaler.state_dict()
        yield _SCALER, torch.tensor(float(state["scale"]))
        yield _TRACKER, torch.tensor(float(state["_growth_tracker"]))


def _step(optimizer: torch.optim.Optimizer, step: Tensor, parameter: nn.Parameter) -> Any:
    """The count of steps as this optimiser keeps it: a number, or a tensor that fused kernels want beside their own."""
    if not isinstance(optimizer, torch.optim.AdamW):
        return int(step)
    return step.to(parameter.device) if optimizer.defaults["fused"] else step.clone()
