"""The inner optimiser: AdamW, fused where this device has it, or with its moments in 8 bits."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import nn

from metaflow_hf.config import OptimizerConfig
from metaflow_hf.errors import ConfigError

logger = logging.getLogger("metaflow_hf.train")

# Where torch has one kernel for a whole group of parameters.
_FUSED: Final = frozenset({"cuda", "cpu", "mps", "xpu"})


def make_optimizer(
    parameters: Mapping[str, nn.Parameter], settings: OptimizerConfig, model: nn.Module
) -> torch.optim.Optimizer:
    """AdamW over ``parameters`` of ``model``; weight decay on matrices only, as usual for language models.

    Raises ``ConfigError`` when ``adamw_8bit`` is wanted and bitsandbytes is not installed.
    """
    kind, extra = _kind(settings, {parameter.device.type for parameter in parameters.values()})
    optimizer: torch.optim.Optimizer = kind(
        parameter_groups(parameters, settings, model),
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        **extra,
    )
    return optimizer


def parameter_groups(
    parameters: Mapping[str, nn.Parameter], settings: OptimizerConfig, model: nn.Module
) -> list[dict[str, Any]]:
    """Those that decay and those that do not: norms, biases and, where so configured, embeddings."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    decaying: list[nn.Parameter] = []
    resting: list[nn.Parameter] = []
    for parameter in parameters.values():
        decays = parameter.dim() >= 2 and (settings.decay_embeddings or id(parameter) not in embeddings)
        (decaying if decays else resting).append(parameter)
    groups = [
        {"params": decaying, "weight_decay": settings.weight_decay},
        {"params": resting, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def bytes_per_parameter(settings: OptimizerConfig) -> int:
    """What the optimiser keeps for each trained parameter: two moments."""
    return 2 if settings.name == "adamw_8bit" else 8


@contextmanager
def quiet_bitsandbytes() -> Iterator[None]:
    """Without its warning that 4-bit kernels, which nothing here uses, are not there; peft imports it where it can."""
    chatty = logging.getLogger("bitsandbytes")
    before = chatty.level
    chatty.setLevel(logging.ERROR)
    try:
        yield
    finally:
        chatty.setLevel(before)


def _kind(settings: OptimizerConfig, devices: set[str]) -> tuple[Any, dict[str, Any]]:
    if settings.name == "adamw":
        return torch.optim.AdamW, {"fused": devices <= _FUSED}
    try:
        with quiet_bitsandbytes():
            import bitsandbytes
    except ImportError as error:
        raise ConfigError(
            "optimizer.name: adamw_8bit needs the package bitsandbytes: pip install 'metaflow-hf[bitsandbytes]', or take "
            "adamw."
        ) from error
    return bitsandbytes.optim.AdamW8bit, {}
