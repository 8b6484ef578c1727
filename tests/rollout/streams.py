"""An accelerator's streams without one: what they do is done at once, and what nothing puts in order is found.

On a real device copies of two streams overlap by chance. Here each stream has a vector clock (Mattern 1989), moved by
its own operations and by the events it waits for; two accesses to the same bytes, one of them a write, that no clock
puts in order are a race, whether or not it would have shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from metaflow_hf.rollout.host_memory import HostTransfers

Clock = dict[str, int]


class Stream:
    """What host_memory.py uses of `torch.cuda.Stream`; an event is a copy of the clock."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.clock: Clock = {name: 0}

    def record_event(self) -> Clock:
        return dict(self.clock)

    def wait_event(self, event: Clock) -> None:
        for name, tick in event.items():
            self.clock[name] = max(self.clock.get(name, 0), tick)


@dataclass
class _Access:
    begin: int
    end: int
    write: bool
    stream: str
    tick: int
    operator: str

    def conflicts_with(self, other: _Access) -> bool:
        return (self.write or other.write) and self.begin < other.end and other.begin < self.end

    def stands_for(self, other: _Access) -> bool:
        """Whoever comes after this one without a race comes after the other as well."""
        covers = self.begin <= other.begin and other.end <= self.end
        return covers and (self.write or (not other.write and other.stream == self.stream))


class RaceDetector(TorchDispatchMode):
    """Stands in for `torch.cuda` as well: `current_stream`, `stream`. `races`: what was found, a line each.

    `host`: where host memory lies, which the device computes with only through copies.
    """

    def __init__(self) -> None:
        super().__init__()
        self.races: list[str] = []
        self.host: set[int] = set()
        self._current = Stream("computation")
        self._accesses: dict[int, list[_Access]] = {}
        self._alive: list[torch.UntypedStorage] = []

    def current_stream(self, _device: torch.device) -> Stream:
        return self._current

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self._current = self._current, stream
        try:
            yield
        finally:
            self._current = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self._current.clock[self._current.name] += 1
        schema = func._schema
        reads_values = not schema.name.endswith("_like") and "::new_" not in schema.name
        for argument, value in self._arguments(schema, args, kwargs):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written or (argument.alias_info is None and reads_values):
                self._access(value, schema.name, write=written)
        for returned in schema.returns:
            if returned.alias_info is None:
                self._access(result, schema.name, write=True)
        return result

    @staticmethod
    def _arguments(schema: Any, args: Any, kwargs: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
        yield from zip(schema.arguments, args, strict=False)
        yield from ((a, kwargs[a.name]) for a in schema.arguments[len(args) :] if a.name in kwargs)

    def _access(self, value: Any, operator: str, *, write: bool) -> None:
        for tensor in tree_leaves(value):
            if not isinstance(tensor, Tensor) or not tensor.numel():
                continue
            steps = zip(tensor.shape, tensor.stride(), strict=True)
            size = (sum((n - 1) * step for n, step in steps) + 1) * tensor.itemsize
            begin, stream = tensor.data_ptr(), self._current
            access = _Access(begin, begin + size, write, stream.name, stream.clock[stream.name], operator)
            storage = tensor.untyped_storage()
            if storage.data_ptr() in self.host and self._current.name == "computation":
                self.races.append(f"{operator} of the device on host memory")
            self._alive.append(storage)  # so that no memory is used twice
            earlier = self._accesses.setdefault(storage.data_ptr(), [])
            for other in earlier:
                if access.conflicts_with(other) and stream.clock.get(other.stream, 0) < other.tick:
                    self.races.append(
                        f"{operator} on the stream of {stream.name} and {other.operator} on that of {other.stream}"
                    )
            earlier[:] = [other for other in earlier if not access.stands_for(other)]
            earlier.append(access)


class TrackedTransfers(HostTransfers):
    """The copies of a carry on the CPU, through streams that `detector` watches."""

    def __init__(self, device: torch.device, detector: RaceDetector) -> None:
        super().__init__(device)
        self._module = detector
        self._loads, self._stores = Stream("loads"), Stream("stores")

    def allocate(self, shape: tuple[int, int, int, int], dtype: torch.dtype, *, zero: bool) -> Tensor:
        order = (shape[2], shape[0], shape[1], shape[3])
        with _disable_current_modes():  # the host's own work, done before it goes on
            memory = (torch.zeros if zero else torch.empty)(order, dtype=dtype)
        self._module.host.add(memory.untyped_storage().data_ptr())
        return memory.permute(1, 2, 0, 3)
