"""One worker beside transformers' Trainer: the same model, batches and order; losses, tokens a second, memory.

    python tests/bench/training.py [--steps 50] [--tokens 128] [--batch 4] [--repetitions 1]

50 M parameters in fp32 on the CPU. Ours counts everything between the first step and the last one: claims, the feed, the
heartbeat, events, and the rounds that are closed and stored meanwhile (one a minute); the Trainer saves and logs nothing. A
plain loop by hand is timed too; it is what the hardware allows. Every second repetition begins with the others.
"""

import argparse
import gc
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from parts.hf_trainer import (
    Setting,
    batches_of,
    make_setting,
    plain_loop,
    start_ours,
    train_ours,
    train_theirs,
)

from metaflow_hf.events import StepDone
from metaflow_hf.store import open_store

SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_layers": 12,
    "num_heads": 8,
    "num_kv_heads": 4,
    "vocab_size": 16_000,
}


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=128, help="sequence length")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--small", action="store_true", help="a model of 1 M parameters: more steps in less time"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape = (
        SHAPE
        if not options.small
        else {**SHAPE, "hidden_size": 128, "intermediate_size": 384, "num_layers": 4, "vocab_size": 2000}
    )
    with tempfile.TemporaryDirectory() as scratch:
        setting = make_setting(
            Path(scratch) / "setting",
            rows=max(20 * options.steps, 400),
            sequence_length=options.tokens,
            batch_size=options.batch,
            claim_samples=20,
            **shape,
        )
        for number in range(options.repetitions):
            compare(setting, Path(scratch) / str(number), options.steps, theirs_first=number % 2 == 1)


class Listener:
    """Steps, when they ended, and how much memory was in use then."""

    def __init__(self) -> None:
        self.steps: list[StepDone] = []
        self.times: list[float] = []
        self.memory: list[int] = []

    def __call__(self, event) -> None:
        if isinstance(event, StepDone):
            self.steps.append(event)
            self.times.append(time.perf_counter())
            self.memory.append(resident_bytes())


def compare(setting: Setting, scratch: Path, num_steps: int, *, theirs_first: bool) -> None:
    """All three in one process; who goes first may find a machine in another state, so it changes."""
    store, heard = open_store(scratch / "store"), Listener()
    start_ours(setting, store)
    batches = batches_of(setting, store, num_steps)
    tokens = [batch.num_tokens for batch in batches]
    found: dict[str, tuple[list[float], float]] = {}

    def train() -> None:
        train_ours(setting, store, num_steps, heard)

    def compared() -> None:
        found["trainer"] = timed(partial(train_theirs, setting, batches, scratch / "trainer"), tokens)
        found["plain"] = timed(partial(plain_loop, setting, batches), tokens)

    for run in (compared, train) if theirs_first else (train, compared):
        run()
        gc.collect()
    steps = heard.steps
    assert [step.tokens for step in steps] == tokens, "not the same batches"
    (losses, theirs), (plain, hand) = found["trainer"], found["plain"]
    # Steps alone, from the end of the first to the end of the last: what loads before is nobody's speed.
    ours = sum(tokens[1:]) / (heard.times[-1] - heard.times[0])
    apart = max(abs(a.loss - b) for a, b in zip(steps, losses, strict=True))
    apart_plain = max(abs(a.loss - b) for a, b in zip(steps, plain, strict=True))
    print(
        f"{len(steps)} steps of {tokens[0]:,} tokens: losses differ from the Trainer's by {apart:.1e} at most (goal <= 1e-5: "
        f"{'holds' if apart <= 1e-5 else 'MISSED'}), from the plain loop's by {apart_plain:.1e}; loss {steps[0].loss:.4f} to "
        f"{steps[-1].loss:.4f}"
    )
    print(
        f"{'theirs' if theirs_first else 'ours'} first, tokens/s: ours {ours:,.0f}, Trainer {theirs:,.0f}, ratio {ours / theirs:.3f} (goal >= 0.95: "
        f"{'holds' if ours / theirs >= 0.95 else 'MISSED'}); plain loop {hand:,.0f}, ratio {ours / hand:.3f}"
    )
    tenth = max(len(steps) // 10, 2)
    settled = heard.memory[tenth:]
    print(
        f"resident memory after step {tenth}: {settled[0] / 2**20:,.0f} MiB, after step {len(steps)}: "
        f"{settled[-1] / 2**20:,.0f} MiB, the most {max(settled) / 2**20:,.0f} MiB"
    )


def timed(run: Callable[[], list[float]], tokens: list[int]) -> tuple[list[float], float]:
    """Losses, and tokens a second from the end of the first step to the end of the last."""
    stamps: list[float] = []
    add = torch.optim.AdamW.step

    def stamped(self, *arguments, **kwargs):
        result = add(self, *arguments, **kwargs)
        stamps.append(time.perf_counter())
        return result

    torch.optim.AdamW.step = stamped
    try:
        losses = run()
    finally:
        torch.optim.AdamW.step = add
    return losses, sum(tokens[1:]) / (stamps[-1] - stamps[0])


if __name__ == "__main__":
    main()
