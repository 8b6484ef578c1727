"""Models with a recurrent carry: the same sequence several times, each segment from the carry of the last.

Such a model has `initial_carry(batch)` and `forward(carry, batch)`, which returns (carry, loss) or an object
with `.carry` and `.loss`; the loss is a sum over counted tokens. Deep supervision: each segment has a loss of
its own, the carry is a constant between segments, so memory is one segment's graph however many there are.
A segment sees the whole sequence: only the model knows which axis of its carry is time, so nothing is cut.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from metaflow_hf.rollout.rng import RngState, rng_kept
from metaflow_hf.rollout.settings import Precision, layers_checkpointed


class SegmentPasses:
    """At most `max_segments` segments of one batch. Losses are averaged over the segments that ran."""

    num_chunks = 1

    def __init__(
        self,
        model: nn.Module,
        batch: Mapping[str, Any],
        max_segments: int,
        device: torch.device,
        *,
        offload: bool,
        checkpointed: bool,
    ) -> None:
        self._model = model
        self._batch = batch
        self._max_segments = max_segments
        self._device = device
        self._home = torch.device("cpu") if offload else device
        self._checkpointed = checkpointed
        self._precision = Precision(device)
        self._starts: list[tuple[RngState, Any]] = []
        self.used_segments = 0

    def carry_bytes(self) -> int:
        """Bytes of the carries that the segments start from."""
        total = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.nbytes
            return tensor

        for _, carry in self._starts:
            map_tensors(count, carry)
        return total

    def losses(self) -> Tensor:
        """Mean over segments of the sum of losses, without a graph."""
        sums: list[Tensor] = []
        with self._precision.entered(), torch.no_grad():
            carry: Any = None
            for segment in range(self._max_segments):
                self._starts.append((RngState.capture(self._device), self._kept(carry)))
                carry, loss = self._segment(segment, carry)
                sums.append(loss)
                if _halted(carry):
                    break
        self.used_segments = len(sums)
        return torch.stack(sums).mean()

    def backward(self, scale: Tensor) -> None:
        """Adds the gradients of (scale × mean of the segments' losses) to every `.grad`, after `losses`."""
        with self._precision.entered(), rng_kept(self._device), self._with_graph():
            for segment, (rng, kept) in enumerate(self._starts):
                rng.restore()
                carry = map_tensors(lambda t: t.to(self._device), kept)
                _, loss = self._segment(segment, carry)
                loss.backward((scale / self.used_segments).to(loss))

    def losses_and_backward(self, scale: Tensor) -> Tensor:
        """Both. Two passes: the weight of a segment is known when the last one has run."""
        total = self.losses()
        self.backward(scale)
        return total

    def _segment(self, segment: int, carry: Any) -> tuple[Any, Tensor]:
        if segment == 0:
            carry = self._model.initial_carry(self._batch)  # type: ignore[operator]
        output = self._model(carry, self._batch)
        carry, loss = output if isinstance(output, tuple) else (output.carry, output.loss)
        return map_tensors(Tensor.detach, carry), loss

    def _kept(self, carry: Any) -> Any:
        return map_tensors(lambda t: t.detach().to(self._home, copy=True), carry)

    @contextmanager
    def _with_graph(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            if self._checkpointed:
                stack.enter_context(layers_checkpointed(self._model))
            yield


def has_recurrent_carry(model: nn.Module) -> bool:
    """Whether the model says how its carry begins."""
    return callable(getattr(model, "initial_carry", None))


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """The same tree with `function` applied to its tensors: dicts, lists, (named) tuples and dataclasses."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return type(tree)({key: map_tensors(function, value) for key, value in tree.items()})  # type: ignore[call-arg]
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_tensors(function, value) for value in tree))
    if isinstance(tree, (list, tuple)):
        return type(tree)(map_tensors(function, value) for value in tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        fields = {
            f.name: map_tensors(function, getattr(tree, f.name)) for f in dataclasses.fields(tree) if f.init
        }
        return dataclasses.replace(tree, **fields)
    return tree


def _halted(carry: Any) -> bool:
    halted = carry.get("halted") if isinstance(carry, Mapping) else getattr(carry, "halted", None)
    return halted is not None and bool(torch.as_tensor(halted).all())
