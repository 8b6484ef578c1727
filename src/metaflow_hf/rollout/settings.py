"""What is switched on a model for the time of one pass, and switched back whatever happens."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

_log = logging.getLogger("metaflow_hf.rollout")


@contextmanager
def layers_checkpointed(model: nn.Module) -> Iterator[None]:
    """Each transformer layer keeps its input only and runs again in the backward pass, carry included.

    transformers' own switch would drop the cache, and works in training mode only; this wraps the layers'
    `forward` instead and works in both modes.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        _log.info(
            f"{type(model).__name__} has no layers to checkpoint; its token chunks keep all activations"
        )
    with ExitStack() as undo:
        for layer in layers:
            undo.callback(_set_or_delete, layer, "forward", layer.__dict__.get("forward", _MISSING))
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        yield


@contextmanager
def own_checkpointing_off(model: nn.Module) -> Iterator[None]:
    """The gradient checkpointing of transformers, which silently drops the cache, is off inside."""
    modules: list[Any] = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    for module in modules:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in modules:
            module.gradient_checkpointing = True


def wants_checkpointing(model: nn.Module) -> bool:
    """Whether the user switched transformers' gradient checkpointing on."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@contextmanager
def hooks_at_the_end(model: nn.Module) -> Iterator[None]:
    """Post-accumulate-gradient hooks of the parameters run once, at the end, on the gradient of all token chunks.

    Such a hook may be an optimizer that steps and frees the gradient: after each token chunk it would step on a part, and
    the others would meet changed weights. Those of parameters that got no gradient inside do not run, nor any after an
    error.
    """
    hooked: list[Any] = [p for p in model.parameters() if getattr(p, _HOOKS)]
    reached: dict[int, Any] = {}
    with ExitStack() as undo:
        for parameter in hooked:
            undo.callback(setattr, parameter, _HOOKS, getattr(parameter, _HOOKS))
            setattr(parameter, _HOOKS, OrderedDict({0: lambda p: reached.setdefault(id(p), p)}))
        yield
    for parameter in reached.values():
        for hook in list(getattr(parameter, _HOOKS).values()):
            hook(parameter)


class Unchanged:
    """What a later backward pass computes again from: the weights and the training flags, at the time of the call."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._versions, self._training = _versions(model), _training(model)

    def require(self) -> None:
        """Raises RuntimeError where either is another now."""
        changed = [
            name for name, version in _versions(self._model).items() if version != self._versions.get(name)
        ]
        if changed:
            raise RuntimeError(
                f"{changed[0]} was modified in place between the rollout and backward(), which computes every token "
                "chunk again. Call backward() before the optimizer's step."
            )
        if _training(self._model) != self._training:
            raise RuntimeError(
                "the model went from training to evaluation mode, or back, between the rollout and backward(), which "
                "computes every token chunk again. Call backward() in the mode of the rollout."
            )


def _versions(model: nn.Module) -> dict[str, int]:
    named = model.named_parameters()
    return {name: p._version for name, p in named if not p.is_inference()}  # noqa: SLF001 - the only name it has


def _training(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


class Precision:
    """The autocast state at the time of the call, to be entered again by a later backward pass."""

    def __init__(self, device: torch.device) -> None:
        self._device_type = device.type
        self._dtype = (
            torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        )

    def entered(self) -> AbstractContextManager[Any]:
        """No cast is cached inside: one made without gradients would be reused by the pass that needs them."""
        if self._dtype is None:
            return torch.autocast(self._device_type, enabled=False) if self._enabled_now() else nullcontext()
        return torch.autocast(self._device_type, dtype=self._dtype, cache_enabled=False)

    def _enabled_now(self) -> bool:
        return torch.is_autocast_enabled(self._device_type)


_MISSING = object()
_HOOKS = "_post_accumulate_grad_hooks"


def _set_or_delete(module: nn.Module, name: str, value: object) -> None:
    if value is _MISSING:
        delattr(module, name)
    else:
        setattr(module, name, value)
