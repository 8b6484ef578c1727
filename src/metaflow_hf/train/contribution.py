"""What one worker adds to a round: counted while it trains, published when it has enough."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from metaflow_hf.train.files import PayloadFiles
from metaflow_hf.train.heartbeat import Heartbeat
from metaflow_hf.train.lineage import ClosedRound, Lineage
from metaflow_hf.train.ranges import Positions
from metaflow_hf.train.records import Delta, Encoding, Payload
from metaflow_hf.train.trainer import Step, Trainer


@dataclass(slots=True)
class Work:
    """What a worker did since the last round.

    ``claims`` are all that it trained at, ``failed`` those whose training raised; ``whole`` says that the trainer
    stands at the end of a finished claim, so that weights and optimiser state belong together.
    """

    tokens: int = 0
    loss_sum: float = 0.0
    claims: list[int] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)
    whole: bool = True
    published: bool = False

    @property
    def loss(self) -> float:
        """Mean loss in nats per token; 0 without any."""
        return self.loss_sum / self.tokens if self.tokens else 0.0

    def add_step(self, step: Step) -> None:
        """Counts one step."""
        self.tokens += step.tokens
        self.loss_sum += step.loss * step.tokens

    def add(self, other: "Work") -> None:
        """Counts the tokens of a finished claim."""
        self.tokens += other.tokens
        self.loss_sum += other.loss_sum


@dataclass(frozen=True, slots=True)
class Published:
    """What was stored: which encoding, which files, how long it took."""

    encoding: Encoding
    tensors: Payload | None
    inner: Payload | None
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Publisher:
    """Stores a worker's work: tensors first, then the record that names them."""

    lineage: Lineage
    files: PayloadFiles
    trainer: Trainer
    heartbeat: Heartbeat
    attempt: str
    encoding: Encoding
    clock: Callable[[], float] = time.monotonic

    def publish(self, base: ClosedRound, work: Work, finished: Positions) -> Published:
        """Publishes ``finished`` positions, and names the claims that were given up or failed.

        The only claimant of a round publishes its weights and its optimiser's state, so that what follows is exactly
        what it would have done itself; otherwise a delta is published.
        """
        began = self.clock()
        alone = set(self.lineage.claims(base.number).values()) <= {self.attempt}
        encoding: Encoding = "weights" if alone else self.encoding
        tensors = self._upload_tensors(base, encoding) if finished else None
        inner = self.upload_inner(base) if alone and finished and work.whole else None
        failed = Positions.of(work.failed)
        self.lineage.publish(
            base.number,
            Delta(
                base=base.digest,
                attempt=self.attempt,
                positions=finished.to_json(),
                tokens=work.tokens,
                loss=work.loss,
                encoding=encoding,
                tensors=tensors,
                inner=inner,
                released=(Positions.of(work.claims) - finished - failed).to_json(),
                failed=failed.to_json(),
            ),
        )
        work.published = True
        return Published(encoding, tensors, inner, self.clock() - began)

    def upload_inner(self, base: ClosedRound) -> Payload:
        """Stores the optimiser's state of this moment for the round after ``base``."""
        draft = self.files.draft("inner")
        digest = self.trainer.write_inner(draft)
        path = self.files.adopt(draft, digest)
        self.heartbeat.expect(num_bytes=digest.size)
        return self.lineage.upload_payload(path, "inner", base.number + 1, digest)

    def _upload_tensors(self, base: ClosedRound, encoding: Encoding) -> Payload:
        draft = self.files.draft("delta")
        digest = self.trainer.write(draft, self.files.fetch(base.manifest.weights), encoding)
        path = self.files.adopt(draft, digest)
        self.heartbeat.expect(num_bytes=digest.size)
        return self.lineage.upload_delta(path, base.number, self.attempt, digest)
