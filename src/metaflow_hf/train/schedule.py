"""How far a run is, and the learning rate there. Pure functions of what is committed and what is expected."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Budget:
    """What ends a run: all positions settled, or ``max_tokens`` tokens trained, whichever comes first."""

    num_positions: int
    max_tokens: int | None = None

    def fraction(self, positions: float, tokens: float) -> float:
        """How much of the run is over, from 0 to 1, after so many positions and tokens."""
        by_data = positions / self.num_positions if self.num_positions else 1.0
        by_tokens = tokens / self.max_tokens if self.max_tokens is not None else 0.0
        return min(max(by_data, by_tokens), 1.0)

    def planned_tokens(self, positions: float, tokens: float) -> int:
        """The tokens at which the run will end, as far as can be told from what was trained up to now."""
        fraction = self.fraction(positions, tokens)
        return round(tokens / fraction) if fraction > 0 else self.max_tokens or 0


@dataclass(frozen=True, slots=True)
class Schedule:
    """A learning rate that rises linearly over the warmup, then falls to ``final_fraction`` of its peak.

    ``wsd`` (warmup, stable, decay: arXiv 2404.06395) falls linearly, during the last ``decay_fraction`` of the run only.
    """

    peak: float
    kind: Literal["cosine", "linear", "constant", "wsd"]
    warmup_fraction: float
    final_fraction: float
    decay_fraction: float = 0.1

    def at(self, fraction: float) -> float:
        """The learning rate when ``fraction`` of the run is over."""
        if fraction < self.warmup_fraction:
            # Never zero: the first step should move.
            return self.peak * max(fraction / self.warmup_fraction, 0.01)
        if self.kind == "constant" or self.warmup_fraction >= 1:
            return self.peak
        falling = self.decay_fraction if self.kind == "wsd" else 1 - self.warmup_fraction
        left = min((1 - fraction) / falling, 1.0) if falling > 0 else 1.0
        shape = 0.5 * (1 + math.cos(math.pi * (1 - left))) if self.kind == "cosine" else left
        return self.peak * (self.final_fraction + (1 - self.final_fraction) * shape)
