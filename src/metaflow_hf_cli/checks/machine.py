"""The machine itself: its GPUs, its memory, and the disks that models and datasets pass over."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from metaflow_hf.machine import usable_memory
from metaflow_hf.report import units
from metaflow_hf_cli.checks.findings import Check, Finding, ok, problem, warning

_GIB: Final = 2**30
_LITTLE_DISK: Final = 10 * _GIB
_NO_DISK: Final = _GIB
_DRIVER: Final = Path("/proc/driver/nvidia/version")


def checks() -> list[Check]:
    return [
        Check(
            "gpu",
            look_at_gpus,
            "see https://pytorch.org/get-started for the build of torch that fits the driver",
        ),
        Check("memory", look_at_memory, "use a larger machine"),
        Check("disk", look_at_disks, "export METAFLOW_HF_CACHE=/a/large/disk"),
    ]


def look_at_gpus() -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:
        # OSError: a library of it does not load.
        yield problem(
            "gpu", f"torch cannot be imported: {error}", "install it: https://pytorch.org/get-started"
        )
        return
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
            # Before Ampere there is one in software, which is slower than fp32.
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            half = "bf16" if has_bf16 else "no bf16: set model.dtype to float32 or float16"
            said = f"{index}: {facts.name}, {units.byte_size(free)} of {units.byte_size(total)} free, {half}"
            if free < total / 2:
                yield warning(
                    "gpu", f"{said}; others use it", "nvidia-smi shows who; choose by CUDA_VISIBLE_DEVICES"
                )
            else:
                yield ok("gpu", said)
    elif _DRIVER.exists():
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
        yield problem(
            "gpu",
            f"there is a GPU driver here, but torch {torch.__version__} sees no GPU",
            "unset CUDA_VISIBLE_DEVICES, which is empty"
            if hidden
            else "install the build of torch for this driver: https://pytorch.org/get-started",
        )
    else:
        yield ok("gpu", f"none: torch {torch.__version__} computes on {torch.get_num_threads()} CPU threads")


def look_at_memory() -> Iterator[Finding]:
    here, whose = usable_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    said = f"{units.byte_size(here)} ({whose}), {cores} cores"
    if here < 4 * _GIB:
        yield warning("memory", f"{said}: little for a model", "give the container or machine at least 4 GiB")
    else:
        yield ok("memory", said)


def look_at_disks() -> Iterator[Finding]:
    from metaflow_hf import environment

    cache = environment.node_cache_root()
    yield from disk("disk", cache, "the cache of models and files", "export METAFLOW_HF_CACHE=/a/large/disk")
    temporary = Path(tempfile.gettempdir())
    if _device(temporary) != _device(cache):
        yield from disk("disk", temporary, "temporary files", "export TMPDIR=/a/large/disk")


def disk(subject: str, place: Path, what: str, fix: str) -> Iterator[Finding]:
    """Whether a directory, which may not exist yet, can be written, and how much fits."""
    existing = _existing(place)
    if not os.access(existing, os.W_OK):
        yield problem(subject, f"{place} ({what}) cannot be written", fix)
        return
    free = shutil.disk_usage(existing).free
    said = f"{place} ({what}): {units.byte_size(free)} free"
    if free < _NO_DISK:
        yield problem(subject, f"{said}: too little for any model", f"free some, or {fix}")
    elif free < _LITTLE_DISK:
        yield warning(subject, f"{said}: little for large models", f"free some, or {fix}")
    else:
        yield ok(subject, said)


def _existing(place: Path) -> Path:
    while not place.exists() and place != place.parent:
        place = place.parent
    return place


def _device(place: Path) -> int:
    return _existing(place).stat().st_dev
