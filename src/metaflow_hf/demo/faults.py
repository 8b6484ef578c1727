"""Faults as inputs: a test schedules what the hub's next answers suffer, and where.

Each fault applies to the next ``times`` requests whose path (percent-decoded, without query) matches the
glob ``path``; faults are used up in the order in which they were scheduled. LFS content is served from
``/lfs/<sha256>/<file name>``, so ``path="*model.safetensors"`` matches a file however it is stored.
"""

import fnmatch
import threading
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["status", "truncate", "corrupt", "drop", "delay", "hold", "trickle"]


class Gate:
    """Holds requests until ``open()`` is called; ``wait_until_held`` tells a test that one has arrived."""

    def __init__(self) -> None:
        self._arrived = threading.Event()
        self._opened = threading.Event()

    def open(self) -> None:
        self._opened.set()

    def wait_until_held(self, timeout_seconds: float = 100.0) -> bool:
        """True once a request stands at the gate; False when none came in time."""
        return self._arrived.wait(timeout_seconds)

    def pass_through(self) -> None:
        self._arrived.set()
        self._opened.wait()


@dataclass(slots=True)
class Fault:
    """One scheduled fault; ``left`` counts down as requests meet it."""

    kind: Kind
    left: int
    path: str
    method: str
    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)
    after_bytes: int = 0
    seconds: float = 0.0
    gate: Gate | None = None


class FaultSchedule:
    """The faults still to come. Thread-safe; ``clear`` also opens every gate."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: list[Fault] = []
        self._gates: list[Gate] = []

    def fail_next(
        self,
        times: int = 1,
        *,
        status: int = 503,
        retry_after_seconds: int | None = None,
        path: str = "*",
        method: str = "*",
    ) -> None:
        """Answer with this status and no content, with ``Retry-After`` if given (429)."""
        headers = {} if retry_after_seconds is None else {"Retry-After": str(retry_after_seconds)}
        self._schedule(Fault("status", times, path, method, status=status, headers=headers))

    def truncate_next(
        self, times: int = 1, *, after_bytes: int = 0, path: str = "*", method: str = "GET"
    ) -> None:
        """Announce the whole body, send its first ``after_bytes`` and close the connection."""
        self._schedule(Fault("truncate", times, path, method, after_bytes=after_bytes))

    def corrupt_next(self, times: int = 1, *, path: str = "*", method: str = "GET") -> None:
        """Send wrong bytes of the right size."""
        self._schedule(Fault("corrupt", times, path, method))

    def drop_next(self, times: int = 1, *, path: str = "*", method: str = "*") -> None:
        """Close the connection without an answer."""
        self._schedule(Fault("drop", times, path, method))

    def delay_next(self, times: int = 1, *, seconds: float, path: str = "*", method: str = "*") -> None:
        """Wait before answering."""
        self._schedule(Fault("delay", times, path, method, seconds=seconds))

    def trickle_next(
        self, times: int = 1, *, seconds: float = 0.01, path: str = "*", method: str = "GET"
    ) -> None:
        """Send the body byte by byte, so many seconds apart, for as long as the client listens."""
        self._schedule(Fault("trickle", times, path, method, seconds=seconds))

    def hold_next(self, times: int = 1, *, path: str = "*", method: str = "*") -> Gate:
        """Answer only once the returned gate is opened: a delay that a test ends itself."""
        gate = Gate()
        self._schedule(Fault("hold", times, path, method, gate=gate))
        return gate

    def clear(self) -> None:
        with self._lock:
            self._faults.clear()
            for gate in self._gates:
                gate.open()
            self._gates.clear()

    def left(self) -> bool:
        """Whether any fault was not met yet."""
        with self._lock:
            return any(fault.left > 0 for fault in self._faults)

    def _schedule(self, fault: Fault) -> None:
        with self._lock:
            self._faults.append(fault)
            if fault.gate is not None:
                self._gates.append(fault.gate)

    def take(self, method: str, path: str) -> Fault | None:
        """The fault that this request meets, used up by one; None for a healthy answer."""
        with self._lock:
            for fault in self._faults:
                matches = fnmatch.fnmatchcase(method, fault.method) and fnmatch.fnmatchcase(path, fault.path)
                if fault.left > 0 and matches:
                    fault.left -= 1
                    return fault
        return None
