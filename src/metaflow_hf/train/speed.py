"""How fast a worker of this run would be on this machine, by doing two of its steps."""

import logging
import time
from pathlib import Path
from typing import Any, Final

import torch

from metaflow_hf import environment
from metaflow_hf.config import TrainConfig
from metaflow_hf.train.devices import threads_per_worker
from metaflow_hf.train.models import load_model, prepare, trained_parameters
from metaflow_hf.train.optimizers import make_optimizer

logger = logging.getLogger("metaflow_hf.train")

# Larger models take longer than the answer is worth.
LARGEST: Final = 200_000_000


def tokens_per_second(model_dir: Path, config: TrainConfig, *, parameters: int) -> float | None:
    """Tokens a second of one worker, all workers of a local run at work; ``None`` where it cannot be told cheaply.

    It is not measured where the workers run on other machines, or the model is large. Weights are random, and the
    random state of this process is left as it was.
    """
    data = config.data
    on_gpu = torch.cuda.is_available()
    if (
        not environment.runs_locally()
        or parameters > LARGEST
        or data.sequence_length > config_token_chunk(config)
    ):
        return None
    device = torch.device("cuda" if on_gpu else "cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(threads_per_worker(config.rounds.workers))
    try:
        with torch.random.fork_rng(devices=[device] if on_gpu else []):
            model: Any = prepare(load_model(model_dir, config.model, initialise=True), config.model)
            model.to(device).train()
            optimizer = make_optimizer(trained_parameters(model), config.optimizer, model)
            ids = torch.randint(
                0, model.config.vocab_size, (data.batch_size, data.sequence_length), device=device
            )
            seconds = min(_step_seconds(model, optimizer, ids) for _ in range(2))
    finally:
        torch.set_num_threads(threads)
    return ids.numel() / seconds


def config_token_chunk(config: TrainConfig) -> int:
    """Sequences longer than this go through the chunked rollout, whose speed is another one."""
    from metaflow_hf.data.sizes import DEFAULT_TOKENS

    size = config.rollout.chunk_size
    return DEFAULT_TOKENS if size == "auto" else size


def _step_seconds(model: torch.nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> float:
    began = time.perf_counter()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    loss.item()  # waits for a GPU
    return time.perf_counter() - began
