"""Long contexts on one GPU: tokens a second, peak memory and the longest context of each mode.

    python tests/bench/rollout_gpu.py [--lengths 32768,131072] [--modes gc_loss,exact,…] [--longest]
                                      [--chunk-size 4096] [--save FILE] [--plot FILE.svg]

The model has the shape of Llama-3.2-1B, random weights in bf16, one row. Runs on any CUDA or ROCm card and
skips without one. All figures are from one process on one card.

    gc_loss          gradient checkpointing of every layer and a blocked loss: the rival
    exact            the rollout, gradient checkpointing inside a token chunk
    exact_offload    the same, the carry in host memory
    truncated        no gradients across token chunks

Speeds are printed beside the rival's and beside the limit: model FLOPs (no recomputation) over the card's
speed in large bf16 matrix products, measured first. `--longest` doubles and bisects the context until a mode
runs out of memory; for the rollout only the last token chunk is computed, whose pass holds the most (all keys,
values and gradients, and one chunk), since the whole takes hours at the lengths that fit.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

MODES = ("gc_loss", "exact", "exact_offload", "truncated")
GIB = 2**30
VOCABULARY = 128_256


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", default="32768,131072")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--longest", action="store_true")
    parser.add_argument("--chunk-size", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: no GPU")
        return
    model, modes = build(arguments.layers), arguments.modes.split(",")
    limit = matmul_flops()
    print(f"{torch.cuda.get_device_name()}, {limit / 1e12:.0f} TFLOP/s in bf16 matrix products")
    rows = [
        measure(model, mode, int(n), arguments.chunk_size, limit)
        for n in arguments.lengths.split(",")
        for mode in modes
    ]
    if arguments.longest:
        for mode in modes:
            print(
                f"longest context, {mode}: {longest(model, mode, arguments.chunk_size):,} tokens", flush=True
            )
    if arguments.save:
        arguments.save.write_text(json.dumps(rows))
    if arguments.plot:
        from parts.memory_plot import draw

        draw(rows, arguments.plot, unit="GiB", title=f"Peak memory, {torch.cuda.get_device_name()}")


def build(layers: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=2**24,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    )
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model


def measure(model: Any, mode: str, length: int, chunk_size: int, limit: float) -> dict[str, Any]:
    ids = torch.randint(0, VOCABULARY, (1, length), device="cuda")
    try:
        step(model, ids[:, :512], mode, 256)
        base = reset()
        started = time.perf_counter()
        loss = float(step(model, ids, mode, chunk_size))
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        print(f"{mode:14} {length:10,} tokens: out of memory", flush=True)
        return {"mode": mode, "length": length, "peak": None}
    seconds = time.perf_counter() - started
    peak = (torch.cuda.max_memory_allocated() - base) / GIB
    used = model_flops(model, length) / seconds / limit
    print(
        f"{mode:14} {length:10,} tokens: {length / seconds:10,.0f} tokens/s, {used:5.1%} of the limit, "
        f"{peak:6.2f} GiB above weights and gradients, loss {loss:.4f}",
        flush=True,
    )
    return {"mode": mode, "length": length, "peak": peak, "seconds": seconds, "loss": loss}


def step(model: Any, ids: Any, mode: str, chunk_size: int) -> Any:
    from parts.long_context import gc_loss

    from metaflow_hf.rollout import chunked_segment_rollout

    if mode == "gc_loss":
        return gc_loss(model, ids, chunk_size)
    model.gradient_checkpointing_disable()
    kind, _, offload = mode.partition("_")
    loss, _ = chunked_segment_rollout(
        model,
        {"input_ids": ids},
        chunk_size=chunk_size,
        gradient=kind,
        gradient_checkpointing=True,
        use_cpu_offload=bool(offload),
        backward=True,
    )
    return loss


def longest(model: Any, mode: str, chunk_size: int) -> int:
    """Tokens, to 1/16 of the answer."""

    def fits(length: int) -> bool:
        reset()
        try:
            ids = torch.randint(0, VOCABULARY, (1, length), device="cuda")
            if mode == "gc_loss":
                step(model, ids, mode, chunk_size)
            else:
                last_token_chunk(model, ids, mode, chunk_size)
            torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            return False
        return True

    low = 8192
    if not fits(low):
        return 0
    while fits(2 * low):
        low *= 2
    step_size = low // 8
    return max(n for n in range(low, 2 * low, step_size) if n == low or fits(n))


def last_token_chunk(model: Any, ids: Any, mode: str, chunk_size: int) -> None:
    from metaflow_hf.rollout.causal_lm import CausalLM
    from metaflow_hf.rollout.passes import ChunkPasses, Plan
    from metaflow_hf.rollout.probe import require
    from metaflow_hf.rollout.sequence import TokenSequence

    model.gradient_checkpointing_disable()
    kind, _, offload = mode.partition("_")
    lm, report = CausalLM(model), require(model, exact=kind == "exact")
    plan = Plan(
        chunk_size=chunk_size,
        exact=kind == "exact",
        use_cpu_offload=bool(offload),
        gradient_checkpointing=True,
        ce_loss_fn=None,
        attention_by_blocks=report.attention_by_blocks,
    )
    sequence = TokenSequence.from_batch({"input_ids": ids}, -100, lm.device)
    passes = ChunkPasses(lm, sequence, plan, linear_head=report.linear_head)
    passes.chunks = passes.chunks[-1:]
    passes.losses_and_backward(torch.ones((), device="cuda"))


def model_flops(model: Any, length: int) -> float:
    """Of one step without recomputation: 6 a weight and token; causal attention 6 · S² · width a layer."""
    config = model.config
    weights = sum(parameter.numel() for parameter in model.parameters())
    width = config.num_attention_heads * config.head_dim
    return 6.0 * weights * length + 6.0 * length**2 * width * config.num_hidden_layers


def matmul_flops(size: int = 8192) -> float:
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / fastest(lambda: a @ b)


def fastest(work: Callable[[], object]) -> float:
    times = []
    for _ in range(10):
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)


def reset() -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


if __name__ == "__main__":
    main()
