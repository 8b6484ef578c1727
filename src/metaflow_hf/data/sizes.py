"""How many samples a chunk should have on this machine."""

import logging
import os
from typing import Final

logger = logging.getLogger("metaflow_hf.data")

# (memory in GiB from which it applies, samples a chunk)
BY_MEMORY: Final = ((60, 8_000), (30, 4_000), (14, 2_000))
SMALLEST: Final = 1_000


def chunk_samples(memory_bytes: int | None = None) -> int:
    """Samples a chunk for a machine with so much memory (default: this one): 2,000 from 16 GB on, 4,000 from 32 GB,
    8,000 from 64 GB, below that 1,000. What is chosen is logged.
    """
    memory = machine_memory() if memory_bytes is None else memory_bytes
    gib = memory / 2**30
    chosen = next((samples for limit, samples in BY_MEMORY if gib >= limit), SMALLEST)
    logger.info(f"dataset_chunk_size: auto is {chosen:,} samples with {gib:.0f} GiB of memory")
    return chosen


def machine_memory() -> int:
    """The machine's physical memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
