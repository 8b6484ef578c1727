"""Which part of this machine a branch of a local run uses; in a pod of its own it has all of it."""

import logging
import os
from pathlib import Path

from metaflow_hf import environment

logger = logging.getLogger("metaflow_hf.train")


def take_share(branch: int, workers: int) -> None:
    """Leaves this process one GPU, or its share of the cores, of a machine with ``workers`` branches.

    The i-th branch gets the i-th visible GPU, several share one when there are more branches than GPUs. Call it
    before CUDA is first used. Does nothing where the branch does not share its machine.
    """
    if not environment.runs_locally() or workers < 2:
        return
    import torch

    gpus = environment.visible_gpus()
    if gpus is None:
        gpus = [str(index) for index in range(_physical_gpus())]
    if gpus:
        environment.see_only_gpu(gpus[branch % len(gpus)])
        return
    threads = threads_per_worker(workers)
    torch.set_num_threads(threads)
    logger.info(f"{workers} workers share this machine: {threads} threads each")


def threads_per_worker(workers: int) -> int:
    """Threads that leave every core of this machine to one worker; more would only wait for each other."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores // workers, torch.get_num_threads()))


def _physical_gpus() -> int:
    # Counting through torch would begin to use CUDA with all of them in sight.
    try:
        return len(list(Path("/proc/driver/nvidia/gpus").iterdir()))
    except FileNotFoundError:
        return 0
