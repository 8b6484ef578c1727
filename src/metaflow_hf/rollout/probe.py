"""Is a model rolled out correctly? Judged once, by its configuration and by a trial (trial.py), then remembered."""

from __future__ import annotations

import logging

from torch import nn

from metaflow_hf.errors import UnsupportedModelError
from metaflow_hf.rollout.carry import cache_layers
from metaflow_hf.rollout.causal_lm import CausalLM, refuse_by_configuration
from metaflow_hf.rollout.segments import has_recurrent_carry
from metaflow_hf.rollout.sequence import TokenSequence
from metaflow_hf.rollout.trial import RolloutReport, Trial

_log = logging.getLogger("metaflow_hf.rollout")

_reports: dict[tuple[str, ...], RolloutReport] = {}


def probe_model(model: nn.Module, *, refresh: bool = False) -> RolloutReport:
    """What the rollout can do with this model; never raises for a model that it cannot do.

    Tried once per architecture, configuration, type and device in this process, then remembered; `refresh`
    tries again. Costs a few passes over 23 tokens. The model is left exactly as it was.
    """
    try:
        lm = CausalLM(model)
        refuse_by_configuration(lm)
        cache_layers(lm.config)
    except UnsupportedModelError as error:
        if has_recurrent_carry(model):
            return RolloutReport(exact=True, truncated=True, reasons=())
        return RolloutReport(exact=False, truncated=False, reasons=(str(error),))
    key = _key(lm)
    if refresh or key not in _reports:
        _reports[key] = Trial(lm).report()
        _log.info(f"{lm.name}: {_reports[key]}")
    return _reports[key]


def require(model: nn.Module, *, exact: bool) -> RolloutReport:
    """The report of a model whose gradients are right. Raises UnsupportedModelError with the reasons."""
    report = probe_model(model)
    if not (report.exact if exact else report.truncated):
        raise UnsupportedModelError("; ".join(report.reasons))
    return report


def refuse_masks(name: str, report: RolloutReport, sequence: TokenSequence) -> None:
    """Raises UnsupportedModelError where the sequence needs its mask and the model's result with one is wrong."""
    if sequence.attention_mask is not None and report.unmasked_only:
        raise UnsupportedModelError(
            f"{name}: its results in token chunks are only right without an attention mask, and this batch has "
            "padding between tokens, or labels that only padding could predict. Pad at the ends of rows and "
            f"set such labels to {sequence.ignore_index}."
        )


def _key(lm: CausalLM) -> tuple[str, ...]:
    adapters = sorted(getattr(lm.model, "peft_config", {}))
    attention = str(getattr(lm.config, "_attn_implementation", None))
    kind = f"{type(lm.model).__module__}.{type(lm.model).__qualname__}"
    configuration = lm.model.config.to_json_string(use_diff=False)
    return (
        kind,
        configuration,
        attention,
        str(lm.model.dtype),
        lm.device.type,
        *adapters,
        *_own_code(lm.model),
    )


def _own_code(model: nn.Module) -> list[str]:
    """What this one model runs around its class's forward pass, which may change its logits."""
    hooks = [*model._forward_pre_hooks.values(), *model._forward_hooks.values()]  # noqa: SLF001 - no public list
    own = [*hooks, *([model.forward] if "forward" in vars(model) else [])]
    return [f"{f.__module__}.{getattr(f, '__qualname__', type(f).__qualname__)}" for f in own]
