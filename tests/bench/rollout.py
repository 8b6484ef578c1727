"""Peak memory and CPU seconds of one training step on one long sequence, mode by mode.

    python tests/bench/rollout.py [--length 2048] [--modes full,gc,…] [--chunk-size 512] [--device cpu|cuda]

Each mode runs in a process of its own: on a CPU the peak is the resident set above weights and gradients,
which is only measurable when freed tensors go back to the system (MALLOC_MMAP_THRESHOLD_, set for the child);
on an accelerator it is the allocator's. All figures of one table are from one run on one machine.

    full               plain backpropagation
    gc                 gradient checkpointing of every layer
    gc_loss            the same, and logits of one block of tokens at a time
    exact              the rollout
    exact_gc           the rollout with gradient checkpointing inside a token chunk
    truncated          the rollout without gradients across token chunks
    truncated_gc       the same with gradient checkpointing inside a token chunk
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

MODES = ("full", "gc", "gc_loss", "exact", "exact_gc", "truncated", "truncated_gc")
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--chunk-size", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--child", choices=MODES)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child, arguments)))
        return
    print(
        f"S={arguments.length} chunk_size={arguments.chunk_size} layers={arguments.layers} {arguments.device}"
    )
    rows = {mode: in_own_process(mode) for mode in arguments.modes.split(",")}
    reference = rows.get("gc_loss") or next(iter(rows.values()))
    for mode, row in rows.items():
        memory, seconds = row["mib"] / reference["mib"], row["seconds"] / reference["seconds"]
        print(
            f"{mode:14} {row['mib']:8.0f} MiB ({memory:5.2f}x)  {row['seconds']:7.2f} s ({seconds:4.2f}x)  "
            f"loss {row['loss']:.6f}  |gradient| {row['norm']:.6f}"
        )


def in_own_process(mode: str) -> dict[str, float]:
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, *sys.argv[1:], "--child", mode]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{mode}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(mode: str, arguments: argparse.Namespace) -> dict[str, float]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from metaflow_hf.rollout import probe_model

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=arguments.layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=2**21,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(arguments.device)
    ids = torch.randint(0, 32_000, (1, arguments.length), device=arguments.device)
    probe_model(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    step(model, ids[:, :64], mode, 32)  # what is loaded lazily is not the sequence's memory
    model.zero_grad(set_to_none=False)
    base = reset_peak(arguments.device)
    started = time.process_time() if arguments.device == "cpu" else time.perf_counter()
    loss = step(model, ids, mode, arguments.chunk_size)
    if arguments.device != "cpu":
        torch.accelerator.synchronize()
    ended = time.process_time() if arguments.device == "cpu" else time.perf_counter()
    peak = peak_bytes(arguments.device) - base
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    return {"mib": peak / MIB, "seconds": ended - started, "loss": float(loss), "norm": float(norm)}


def step(model, ids, mode: str, chunk_size: int):
    from torch.nn.functional import cross_entropy

    from metaflow_hf.rollout import chunked_segment_rollout
    from metaflow_hf.rollout.loss import head_loss_sum
    from metaflow_hf.rollout.sequence import shifted_targets

    if mode.startswith(("exact", "truncated")):
        kind, _, checkpointing = mode.partition("_")
        loss, _ = chunked_segment_rollout(
            model,
            {"input_ids": ids},
            chunk_size=chunk_size,
            gradient=kind,
            gradient_checkpointing=bool(checkpointing),
            backward=True,
        )
        return loss
    if mode != "full":
        model.train().activation_checkpointing_enable()
    targets = shifted_targets(ids, -100)
    if mode == "gc_loss":
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        loss = head_loss_sum(model.lm_head, hidden, targets, -100, None) / (ids.shape[1] - 1)
    else:
        logits = model(input_ids=ids, use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    return loss.detach()


def reset_peak(device: str) -> int:
    import torch

    if device != "cpu":
        torch.accelerator.synchronize()
        torch.accelerator.reset_peak_memory_stats()
        return torch.accelerator.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    return _status("VmRSS")


def peak_bytes(device: str) -> int:
    import torch

    return _status("VmHWM") if device == "cpu" else torch.accelerator.max_memory_allocated()


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
