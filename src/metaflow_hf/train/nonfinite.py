"""A step whose loss or gradients are not finite: which one it was, kept so that it can be looked at and repeated."""

import json
from dataclasses import asdict, dataclass
from typing import Final

from metaflow_hf.data.ledger import Claim
from metaflow_hf.store.objects import ObjectStore, new_nonce

# So many in a row are no accident of the data.
MOST_IN_A_ROW: Final = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class BadStep:
    """Rows ``start`` to ``stop`` of ``block_id`` make the batches of a position; ``step`` counts its steps from 1.

    ``input_ids`` are the sequences of the step without padding. ``loss`` and ``grad_norm`` are text, for JSON has no
    word for them.
    """

    position: int
    block_id: int
    start: int
    stop: int
    step: int
    loss: str
    grad_norm: str
    learning_rate: float
    input_ids: list[list[int]]

    @classmethod
    def of(
        cls, claim: Claim, step: int, loss: float, norm: float, rate: float, ids: list[list[int]]
    ) -> "BadStep":
        """The step of a claim."""
        return cls(
            position=claim.position,
            block_id=claim.block_id,
            start=claim.start,
            stop=claim.stop,
            step=step,
            loss=str(loss),
            grad_norm=str(norm),
            learning_rate=rate,
            input_ids=ids,
        )

    def sentence(self) -> str:
        """What happened, and where."""
        what = f"the loss became {self.loss}"
        if self.loss not in ("nan", "inf", "-inf"):
            what = f"the norm of the gradients became {self.grad_norm} (loss {self.loss:.6})"
        where = f"block {self.block_id}, rows {self.start} to {self.stop}"
        return f"{what} in step {self.step} of position {self.position} ({where})"


def save_bad_step(store: ObjectStore, step: BadStep) -> str:
    """Stores which step it was, with its tokens, under ``nonfinite/``; returns the URI."""
    key = f"nonfinite/{step.position:08d}-{step.step}-{new_nonce()[:8]}.json"
    store.create(key, json.dumps(asdict(step)).encode())
    return f"{store.uri}/{key}"
