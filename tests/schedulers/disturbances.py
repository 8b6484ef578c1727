"""Faults, each at a moment that a container's own log tells: nothing here waits for a time."""

import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .pods import Pod

Action = Callable[[Pod], None]


@dataclass
class Disturbances:
    """What happens to which container. `watch` is for an executor; `check` raises unless all of it happened."""

    planned: dict[tuple[str, int, int], list[tuple[str, Action, bool]]] = field(default_factory=dict)
    _threads: list[threading.Thread] = field(default_factory=list)
    _missed: list[str] = field(default_factory=list)

    def when(
        self, step: str, index: int, attempt: int, says: str, action: Action, *, required: bool = True
    ) -> None:
        """Does `action` to this container as soon as its log has a line that matches `says`."""
        self.planned.setdefault((step, index, attempt), []).append((says, action, required))

    def hold(self, step: str, index: int, attempt: int, says: str, until: Sequence[threading.Event]) -> None:
        """Freezes this container, if there is one that says it, until all of it has happened."""

        def freeze(pod: Pod) -> None:
            with pod.frozen():
                assert all(event.wait(300) for event in until), f"{pod.root.name} was held for 5 minutes"

        self.when(step, index, attempt, says, freeze, required=False)

    def watch(self, pod: Pod, step: str, index: int, attempt: int) -> None:
        for says, action, required in self.planned.pop((step, index, attempt), ()):
            thread = threading.Thread(target=self._act, args=(pod, says, action, required), daemon=True)
            thread.start()
            self._threads.append(thread)

    def check(self) -> None:
        for thread in self._threads:
            thread.join()
        missing = [pod for pod, plans in self.planned.items() if any(required for *_, required in plans)]
        assert not missing, f"never started: {missing}"
        assert not self._missed, self._missed

    def _act(self, pod: Pod, says: str, action: Action, required: bool) -> None:
        while not re.search(says, pod.printed()):
            if not pod.is_running():
                if required:
                    self._missed.append(f"{pod.root.name} ended before it said {says!r}")
                return
            time.sleep(0.05)
        if pod.is_running():
            action(pod)
        elif required:
            self._missed.append(f"{pod.root.name} had ended when it said {says!r}")
