"""Which part of this machine a branch of a local run uses; in a pod of its own it has all of it."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from metaflow_hf import environment
from metaflow_hf.config import TrainConfig
from metaflow_hf.errors import ConfigError

logger = logging.getLogger("metaflow_hf.train")


def take_share(branch: int, workers: int, gpus_per_worker: int = 1) -> None:
    """Leaves this process its GPUs, or its share of the cores, of a machine with ``workers`` branches.

    The i-th branch gets the i-th ``gpus_per_worker`` visible GPUs; with more branches than GPUs, several share one.
    Where as few are visible as it takes, they are its own already (``pinned_gpus``). Call it before CUDA is first used.
    Does nothing where the branch does not share its machine.
    """
    if not environment.runs_locally() or workers * gpus_per_worker < 2:
        return
    gpus = visible_gpus()
    if gpus:
        if len(gpus) > gpus_per_worker:
            environment.see_only_gpus(share_of(gpus, branch, gpus_per_worker))
        return
    import torch

    threads = threads_per_worker(workers * gpus_per_worker)
    torch.set_num_threads(threads)
    logger.info(f"{workers} workers share this machine: {threads} threads each")


def share_of(gpus: Sequence[str], branch: int, per_branch: int) -> list[str]:
    """The GPUs of a branch: the next ones after those of the branch before it, from the first again at the end."""
    return [gpus[(branch * per_branch + number) % len(gpus)] for number in range(min(per_branch, len(gpus)))]


def check_enough_gpus(workers: int, gpus_per_worker: int, *, may_share: bool) -> None:
    """Raises ``ConfigError`` when the branches of a local run need more GPUs than this machine shows.

    A machine without any trains on its cores.
    """
    gpus = visible_gpus() if environment.runs_locally() else []
    if not gpus or may_share or workers * gpus_per_worker <= len(gpus):
        return
    each = f" of {gpus_per_worker} GPUs each (rounds.gpus_per_worker)" if gpus_per_worker > 1 else ""
    raise ConfigError(
        f"{workers} workers{each} need {workers * gpus_per_worker} GPUs, and this machine shows {len(gpus)}: two on one GPU "
        f"are slower than one. Pass --num_gpus {len(gpus) // gpus_per_worker or 1} (0: all), or set rounds.share_gpus: true "
        "to have it so."
    )


def check_parallel(config: TrainConfig) -> None:
    """Raises ``ConfigError`` for what cannot be done where no process has all weights (FSDP)."""
    if config.rounds.gpus_per_worker == 1 or config.rounds.parallel != "fsdp":
        return
    unknown = {
        "optimizer.name: adamw_8bit": config.optimizer.name == "adamw_8bit",
        "model.compile: true": config.model.compile,
        "rollout.use_chunked_training: true": config.rollout.use_chunked_training is True,
        "evaluation.every_rounds": config.evaluation.every_rounds is not None,
    }
    wrong = [name for name, is_on in unknown.items() if is_on]
    if wrong:
        raise ConfigError(
            f"rounds.parallel: fsdp cannot be used with {', '.join(wrong)}: leave that out, or take ddp."
        )


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES spells them; torch is not asked, so that CUDA is not
    begun with.
    """
    named = environment.visible_gpus()
    return [str(index) for index in range(_physical_gpus())] if named is None else named


def threads_per_worker(workers: int) -> int:
    """Threads that leave every core of this machine to one worker; more would only wait for each other."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores // workers, torch.get_num_threads()))


def _physical_gpus() -> int:
    try:
        return len(list(Path("/proc/driver/nvidia/gpus").iterdir()))
    except FileNotFoundError:
        return 0
