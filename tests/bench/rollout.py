"""Peak memory and seconds of one training step on one long sequence, mode by mode.

    python tests/bench/rollout.py [--lengths 4096,8192] [--modes gc_loss,exact_1024,…] [--save FILE] [--merge FILE …]

Each mode runs in a process of its own, at each length. The peak is the resident set above weights and
gradients, which is only measurable when freed tensors go back to the system (MALLOC_MMAP_THRESHOLD_, set for
the child); the seconds are those of one core's CPU. Ratios are to gradient checkpointing with a blocked loss.
All figures of one table are from one machine; `--save` adds each row to a file, `--merge` prints those of several calls
as one table. On a GPU: tests/bench/rollout_gpu.py.

The model: 50 M parameters (12 layers, 8 query and 2 key heads, hidden 512, vocabulary 32,000), fp32.

    full, gc, gc_loss, alst, seco      the rivals, see parts/long_context.py; seco in token chunks of 1,024
    exact_C, truncated_C               the rollout in token chunks of C tokens
    exact_gc_C, truncated_gc_C         the same with gradient checkpointing inside a token chunk
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

RIVALS = ("full", "gc", "gc_loss", "alst", "seco")
OURS = ("exact_256", "exact_512", "exact_gc_512", "truncated_256")
SECO_CHUNK = 1024
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", default="2048,4096")
    parser.add_argument("--modes", default=",".join(RIVALS + OURS))
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--jobs", type=int, default=1, help="processes at once, one core each")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--merge", type=Path, nargs="+")
    parser.add_argument("--plot", type=Path, help="an SVG of the peaks")
    parser.add_argument("--child", nargs=2, metavar=("MODE", "LENGTH"))
    arguments = parser.parse_args()
    if arguments.child:
        mode, length = arguments.child
        print(json.dumps(measure(mode, int(length), arguments.layers)))
        return
    if arguments.merge:
        rows = [json.loads(line) for path in arguments.merge for line in path.read_text().splitlines()]
    else:
        lengths = [int(length) for length in arguments.lengths.split(",")]
        cases = [(mode, n, arguments.layers) for n in lengths for mode in arguments.modes.split(",")]
        with ThreadPoolExecutor(arguments.jobs) as pool:
            rows = list(pool.map(lambda case: in_own_process(*case, arguments.save), cases))
    report(rows)
    if arguments.plot:
        from parts.memory_plot import draw

        peaks = [{"mode": r["mode"], "length": r["length"], "peak": r["mib"]} for r in rows]
        draw(
            peaks, arguments.plot, unit="MiB", title="Peak memory of one training step, 50 M parameters, fp32"
        )


def in_own_process(mode: str, length: int, layers: int, save: Path | None) -> dict[str, Any]:
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--layers", str(layers), "--child", mode, str(length)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{mode}: {done.stderr}")
    row = done.stdout.splitlines()[-1]
    if save:
        with save.open("a") as lines:
            lines.write(row + "\n")
    return json.loads(row)


def report(rows: list[dict[str, Any]]) -> None:
    lengths = sorted({row["length"] for row in rows})
    for length in lengths:
        print(
            f"\nS = {length:,}                 MiB   to gc_loss    CPU s   to gc_loss       loss   |gradient|"
        )
        here = {row["mode"]: row for row in rows if row["length"] == length}
        reference = here.get("gc_loss") or next(iter(here.values()))
        for mode, row in here.items():
            memory, seconds = row["mib"] / reference["mib"], row["seconds"] / reference["seconds"]
            print(
                f"{mode:18} {row['mib']:9.0f}  {memory:9.2f}x {row['seconds']:8.1f}  {seconds:9.2f}x "
                f"{row['loss']:12.6f} {row['norm']:11.6f}"
            )
    if len(lengths) > 1:
        short, long = lengths[-2:]
        print(f"\ngrowth from {short:,} to {long:,} tokens")
        at = {(row["mode"], row["length"]): row["mib"] for row in rows}
        for mode in dict.fromkeys(row["mode"] for row in rows):
            if (mode, short) in at and (mode, long) in at:
                growth = (at[mode, long] - at[mode, short]) * 1024 / (long - short)
                print(f"{mode:18} {growth:9.1f} KiB a token")


def measure(mode: str, length: int, layers: int) -> dict[str, Any]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from metaflow_hf.rollout import probe_model

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=2**21,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    ids = torch.randint(0, 32_000, (1, length))
    probe_model(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    step(model, ids[:, :64], mode, 32)  # what is loaded lazily is not the sequence's memory
    for parameter in model.parameters():
        parameter.grad.zero_()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    base, started = resident_bytes("VmRSS"), time.process_time()
    loss = step(model, ids, mode, None)
    seconds, peak = time.process_time() - started, resident_bytes("VmHWM") - base
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    return {
        "mode": mode,
        "length": length,
        "mib": peak / MIB,
        "seconds": seconds,
        "loss": float(loss),
        "norm": float(norm),
    }


def step(model: Any, ids: Any, mode: str, chunk_size: int | None) -> Any:
    from parts.long_context import RIVALS as STEPS

    from metaflow_hf.rollout import chunked_segment_rollout

    if mode in STEPS:
        return STEPS[mode](model, ids, chunk_size or SECO_CHUNK)
    kind, *checkpointing, size = mode.split("_")
    loss, _ = chunked_segment_rollout(
        model,
        {"input_ids": ids},
        chunk_size=chunk_size or int(size),
        gradient=kind,
        gradient_checkpointing=bool(checkpointing),
        backward=True,
    )
    return loss


def resident_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
