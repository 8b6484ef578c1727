"""How many samples a chunk, and how many tokens a token chunk, should have on this machine."""

import logging
from typing import Final

from metaflow_hf.machine import usable_memory

logger = logging.getLogger("metaflow_hf.data")

# (memory in GiB from which it applies, samples a chunk); machines report a little less than what is printed on them.
BY_MEMORY: Final = ((60, 8_000), (30, 4_000), (14, 2_000))
SMALLEST: Final = 1_000

# (memory of the GPU in GiB from which it applies, tokens a token chunk)
BY_GPU_MEMORY: Final = ((22, 4_096), (18, 2_048), (9, 1_024))
SMALLEST_TOKENS: Final = 512
DEFAULT_TOKENS: Final = 2_048


def chunk_samples(memory_bytes: int | None = None) -> int:
    """Samples a chunk for a machine with so much memory (default: what this process may use): 2,000 from 16 GB on,
    4,000 from 32 GB, 8,000 from 64 GB, below that 1,000. What is chosen is logged with the reason.
    """
    memory, reason = usable_memory() if memory_bytes is None else (memory_bytes, "given")
    gib = memory / 2**30
    chosen = next((samples for limit, samples in BY_MEMORY if gib >= limit), SMALLEST)
    logger.info(f"dataset_chunk_size: auto is {chosen:,} samples with {gib:.1f} GiB of memory ({reason})")
    return chosen


def token_chunk_size(gpu_memory_bytes: int | None, *, exact: bool = True) -> int:
    """Tokens a token chunk for a GPU with so much memory: 1,024 from 10 GB on, 2,048 from 20 GB, 4,096 from 24 GB,
    below that 512; 2,048 without a GPU. What is chosen is logged with the reason.

    Gradients that are not ``exact`` depend on it, so they get the same 2,048 on every machine.
    """
    if not exact:
        chosen, reason = DEFAULT_TOKENS, "truncated gradients must be cut alike by every worker"
    elif gpu_memory_bytes is None:
        chosen, reason = DEFAULT_TOKENS, "no GPU"
    else:
        gib = gpu_memory_bytes / 2**30
        chosen = next((tokens for limit, tokens in BY_GPU_MEMORY if gib >= limit), SMALLEST_TOKENS)
        reason = f"{gib:.1f} GiB of GPU memory"
    logger.info(f"chunk_size: auto is {chosen:,} tokens ({reason})")
    return chosen
