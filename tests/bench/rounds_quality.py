"""What rounds cost in quality: held-out loss of a small Llama on Python's documentation, equal tokens for all.

    python tests/bench/rounds_quality.py [--seeds 1] [--tokens 400000] [--size small] [--processes 2] [--results FILE]

Rows: one worker; synchronous data parallelism (gradients averaged in each step, so the batch is as many times
larger, with the same learning rate and with twice that); rounds of several workers. Trainer, encodings, merge and outer
step are the shipped ones (see parts/lockstep.py); a step is 256 tokens of one worker. With ``--results`` what was
measured is kept, and a second run measures only what is missing.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev

import torch
from parts.lockstep import Outcome, Setting, Text, Training, prepare_text

from metaflow_hf.config import RoundsConfig, TrainConfig
from metaflow_hf.store import open_store
from metaflow_hf.train.outer import average, nesterov

LEARNING_RATE = 2e-3
SEQUENCE, BATCH = 128, 2
STEPS_PER_CLAIM = 5
# Two rows fill the sequences of a step.
CLAIM_ROWS = STEPS_PER_CLAIM * BATCH
HELD_OUT = 60
SIZES: dict[str, dict[str, int]] = {
    # 0.13 M and 0.9 M parameters.
    "small": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
    },
    "million": {},
}
GOAL = 1.02


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One row of the table: ``workers`` with ``steps`` each a round; ``batches`` is how many batches make a step."""

    name: str
    workers: int = 1
    steps: int = 10
    batches: int = 1
    rate: float = 1.0
    merge: str = "diloco"
    encoding: str = "int8"
    killed: float = 0.0
    solo_start: float = 0.0


ROUNDS = Cell(name="4 workers, 10 steps", workers=4)
SYNCHRONOUS = Cell(name="synchronous, 4 workers", batches=4)
TABLE = (
    Cell(name="one worker"),
    SYNCHRONOUS,
    Cell(name="synchronous, 4 workers, 2x rate", batches=4, rate=2.0),
    Cell(name="2 workers, 10 steps", workers=2),
    Cell(name="2 workers, 50 steps", workers=2, steps=50),
    ROUNDS,
    replace(ROUNDS, name="4 workers, 50 steps", steps=50),
    replace(ROUNDS, name="8 workers, 10 steps", workers=8),
    replace(ROUNDS, name="8 workers, 50 steps", workers=8, steps=50),
    replace(ROUNDS, name="4 workers, 10 steps, 1 in 5 killed", killed=0.2),
    replace(ROUNDS, name="4 workers, 10 steps, fp32", encoding="fp32"),
    replace(ROUNDS, name="4 workers, 10 steps, one starts alone", solo_start=0.1),
    replace(ROUNDS, name="4 workers, 10 steps, average", merge="average"),
    replace(ROUNDS, name="4 workers, 50 steps, average", merge="average", steps=50),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--results", type=Path, help="a file of JSON lines")
    options = parser.parse_args()
    known = read(options.results)
    wanted = [(cell, seed) for seed in range(options.seeds) for cell in TABLE]
    missing = [job for job in wanted if key_of(*job, options) not in known]
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="bench-quality-") as directory:
        scratch = Path(directory)
        text = prepare_text(scratch / "model", held_out=HELD_OUT, **SIZES[options.size])
        with ProcessPoolExecutor(options.processes, mp_context=context) as pool:
            jobs = {
                pool.submit(measure, cell, seed, options.tokens, text, scratch): (cell, seed)
                for cell, seed in missing
            }
            for job in as_completed(jobs):
                key = key_of(*jobs[job], options)
                known[key] = job.result()
                print(f"  {key}: {known[key]:.4f}", flush=True)
                if options.results is not None:
                    with options.results.open("a") as file:
                        file.write(json.dumps([key, known[key]]) + "\n")
    show({cell: [known[key_of(cell, seed, options)] for seed in range(options.seeds)] for cell in TABLE})


def measure(cell: Cell, seed: int, tokens: int, text: Text, scratch: Path) -> float:
    """The held-out loss of one training."""
    torch.set_num_threads(1)
    place = scratch / f"{os.getpid()}-{time.monotonic_ns()}"
    store = open_store(f"memory://{place.name}")
    outcome: Outcome = Training(setting_of(cell, seed, tokens), text, store, place / "files").run()
    return outcome.loss


def setting_of(cell: Cell, seed: int, tokens: int) -> Setting:
    rounds = RoundsConfig()
    config = TrainConfig.parse(
        {
            "model": {"initialise": "random", "dtype": "float32"},
            "data": {
                "sequence_length": SEQUENCE,
                "batch_size": BATCH * cell.batches,
                "epochs": 100,
                "seed": seed,
            },
            "optimizer": {
                "learning_rate": LEARNING_RATE * cell.rate,
                "weight_decay": 0.01,
                "warmup_fraction": 0.05,
            },
            "rounds": {"max_tokens": tokens, "claim_samples": CLAIM_ROWS * cell.batches},
        }
    )
    diloco = nesterov(rounds.outer_learning_rate, rounds.outer_momentum)
    return Setting(
        config=config,
        claims=cell.steps // STEPS_PER_CLAIM,
        workers=cell.workers,
        outer_step=average if cell.merge == "average" else diloco,
        encoding="fp32" if cell.encoding == "fp32" else "int8/1024",
        killed=cell.killed,
        solo_start=cell.solo_start,
    )


def show(losses: dict[Cell, list[float]]) -> None:
    synchronous = mean(losses[SYNCHRONOUS])
    print(f"{'':40} {'loss':>7} {'+-':>6}  to synchronous")
    for cell, found in losses.items():
        spread = stdev(found) if len(found) > 1 else 0.0
        print(f"{cell.name:40} {mean(found):7.3f} {spread:6.3f}  {mean(found) / synchronous:.3f}")
    ratio = mean(losses[ROUNDS]) / synchronous
    print(
        f"4 workers to synchronous: {ratio:.3f}, goal <= {GOAL:g}: {'holds' if ratio <= GOAL else 'MISSED'}"
    )


def key_of(cell: Cell, seed: int, options: argparse.Namespace) -> str:
    settings = {name: value for name, value in asdict(cell).items() if name != "name"}
    return json.dumps({"size": options.size, "tokens": options.tokens, "seed": seed, **settings})


def read(results: Path | None) -> dict[str, float]:
    if results is None or not results.exists():
        return {}
    lines: Iterable[str] = results.read_text().splitlines()
    return {key: loss for key, loss in map(json.loads, lines)}


if __name__ == "__main__":
    main()
