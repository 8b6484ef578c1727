"""How fast a worker of this run would be on this machine, by doing a few of its passes."""

import logging
import time
from pathlib import Path
from typing import Any, Final

import torch

from metaflow_hf import environment
from metaflow_hf.config import TrainConfig
from metaflow_hf.train.devices import threads_per_worker
from metaflow_hf.train.footprint import token_chunk
from metaflow_hf.train.models import compute_dtype, load_model, prepare, trained_parameters
from metaflow_hf.train.optimizers import make_optimizer

logger = logging.getLogger("metaflow_hf.train")

# Larger models take longer than the answer is worth.
LARGEST: Final = 200_000_000
PROBE_SECONDS: Final = 20.0
# What a core of a CPU does in about a second; a probe takes some of these.
CPU_FLOPS: Final = 3e10
# Forward and backward of a parameter, for each token.
FLOPS_PER_TOKEN: Final = 6


def tokens_per_second(model_dir: Path, config: TrainConfig, *, parameters: int) -> float | None:
    """Tokens a second of one worker, with all its GPUs, all workers of a local run at work; ``None`` where it cannot be
    told cheaply.

    It is not measured where the workers run on other machines, the model is large, or sequences are rolled out.
    Passes on a CPU may be shorter than the run's; what they would take is scaled by tokens. Takes 20 seconds at
    most as a rule. Weights are random, and the random state of this process is left as it was.
    """
    if not environment.runs_locally() or parameters > LARGEST or _is_rolled_out(config):
        return None
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    dtype, processes = compute_dtype(config.model, device), config.rounds.gpus_per_worker
    threads = torch.get_num_threads()
    torch.set_num_threads(threads_per_worker(config.rounds.workers * processes))
    try:
        with torch.random.fork_rng(devices=[device] if on_gpu else []):
            held = dtype if config.model.lora else torch.float32
            model: Any = prepare(
                load_model(model_dir, config.model, initialise=True, dtype=held), config.model
            )
            model.to(device).train()
            shape = _shape(config, parameters, None if on_gpu else torch.get_num_threads())
            ids = torch.randint(0, model.config.vocab_size, shape, device=device)
            optimizer = make_optimizer(trained_parameters(model), config.optimizer, model)
            passes, step = _fastest(model, optimizer, ids, dtype)
    finally:
        torch.set_num_threads(threads)
    tokens = (
        config.data.batch_size * config.data.sequence_length * config.optimizer.gradient_accumulation_steps
    )
    return tokens / (passes * tokens / ids.numel() / processes + step)


def _is_rolled_out(config: TrainConfig) -> bool:
    use = config.rollout.use_chunked_training
    return use is not False and config.data.sequence_length > token_chunk(config)


def _shape(config: TrainConfig, parameters: int, cores: int | None) -> tuple[int, int]:
    """The batch of a probe: the run's own, or as much of it as a CPU does in a few seconds."""
    batch, length = config.data.batch_size, config.data.sequence_length
    if cores is None:
        return batch, length
    tokens = max(int(3 * cores * CPU_FLOPS / (FLOPS_PER_TOKEN * parameters)), 64)
    length = min(length, tokens)
    return min(batch, max(tokens // length, 1)), length


def _fastest(
    model: Any, optimizer: torch.optim.Optimizer, ids: torch.Tensor, dtype: torch.dtype
) -> tuple[float, float]:
    """Seconds of forward and backward, and of the optimiser, each the fastest of up to three."""
    began = time.perf_counter()
    found: list[tuple[float, float]] = []
    while len(found) < 3 and (not found or time.perf_counter() - began < PROBE_SECONDS / 2):
        found.append(_seconds(model, optimizer, ids, dtype))
    return min(passes for passes, _ in found), min(step for _, step in found)


def _seconds(
    model: Any, optimizer: torch.optim.Optimizer, ids: torch.Tensor, dtype: torch.dtype
) -> tuple[float, float]:
    began = time.perf_counter()
    with torch.autocast(ids.device.type, dtype=dtype, enabled=dtype != torch.float32):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    loss.item()  # waits for a GPU
    between = time.perf_counter()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if ids.is_cuda:
        torch.cuda.synchronize()
    return between - began, time.perf_counter() - between
