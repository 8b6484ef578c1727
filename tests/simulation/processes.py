"""Simulated processes: each runs until it asks for something, and then waits for its turn."""

from collections.abc import Callable

from greenlet import greenlet


class Killed(BaseException):
    """The process is gone: nothing of it reaches the store any more, not even its cleaning up."""


class Process:
    """One process: real code on a stack of its own, that only the scheduler lets go on.

    ``turns`` counts how often it went on, ``outcome`` is what ended it (``None`` for a good end).
    """

    def __init__(self, name: str, slot: int, main: Callable[["Process"], None]) -> None:
        self.name = name
        self.slot = slot
        self.wakes_at = 0.0
        self.turns = 0
        self.killed = False
        self.ended = False
        self.told_to_stop: str | None = None
        self.fault = ""
        self.outcome: BaseException | None = None
        self._main = main
        self._greenlet = greenlet(self._run)
        # Whoever starts processes schedules them.
        assert self._greenlet.parent is not None
        self._give_back = self._greenlet.parent.switch

    def _run(self) -> None:
        try:
            if self.killed:
                raise Killed
            self._main(self)
        except BaseException as error:
            self.outcome = error
        self.ended = True

    def resume(self) -> None:
        """Lets it go on until its next pause or its end; called by the scheduler."""
        self.turns += 1
        self._greenlet.switch()

    def pause(self) -> None:
        """Gives the turn back; called by the process itself."""
        self._give_back()
        if self.killed:
            raise Killed
