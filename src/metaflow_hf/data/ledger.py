"""What a ledger of claims promises, whoever keeps it.

Two keep one: ``StandaloneLedger`` for people with a loop of their own, and the rounds of ``metaflow_hf.train``,
where "done" means "in the model".
"""

from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to train rows ``[start, stop)`` of one block, all of one chunk, once in ``epoch``.

    ``position`` is the claim's number in its ledger's order; ``token`` tells this claim from any other claim of
    the same position.
    """

    block_id: int
    chunk_id: int
    start: int
    stop: int
    epoch: int
    position: int
    token: str

    @property
    def num_samples(self) -> int:
        return self.stop - self.start


class Ledger(Protocol):
    """Who trains what, and what is done; shared by any number of processes on any machines."""

    def claim(self) -> Claim | None:
        """Something that nobody else holds or has done, or ``None`` when nothing is free now."""
        ...

    def complete(self, claim: Claim, steps: int) -> None:
        """Records that the claim was trained with ``steps`` optimiser steps.

        Raises ``ClaimLost`` when another worker took it over; then its work must be dropped.
        """
        ...

    def release(self, claim: Claim) -> None:
        """Gives the claim back untrained; it is free for others at once."""
        ...

    def is_chunk_trained(self, block_id: int, chunk_id: int) -> bool:
        """Whether every row of the chunk is done in the current epoch."""
        ...

    def progress(self) -> dict[str, Any]:
        """``epoch, total_chunks, done_chunks, claimed_chunks, done_samples, workers`` as known now."""
        ...

    def is_epoch_complete(self) -> bool:
        """Whether every chunk of the current epoch is done."""
        ...

    def start_new_epoch(self) -> None:
        """Advances by one epoch, once, however many workers call it, and only when the current one is complete."""
        ...
