"""What the rollout will do with a model, from its configuration alone: no weights, no GPU.

A miniature of the architecture is built and probed; the full-sized model exists on the meta device only, where a few
tokens show the shapes of its carry. So a model of any size is judged on a laptop in seconds.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from metaflow_hf.errors import UnsupportedModelError
from metaflow_hf.rollout.carry import KVCarry
from metaflow_hf.rollout.causal_lm import CausalLM
from metaflow_hf.rollout.miniature import small_model
from metaflow_hf.rollout.probe import probe_model
from metaflow_hf.rollout.trial import RolloutReport

_log = logging.getLogger("metaflow_hf.rollout")

_EXPERTS = "_experts_implementation"
_FEW = 4  # tokens that show the shapes of a carry
_FAULTS = (AttributeError, TypeError, ValueError, LookupError, NotImplementedError, RuntimeError)
BYTES_PER_TRAINED_PARAMETER = 16
"""fp32 weights, their gradient, and two moments of AdamW."""


@dataclass(frozen=True)
class Forecast:
    """`report` is that of a miniature. Sizes are the full model's, for one row and a carry in `dtype`.

    `bytes_per_token`: keys and values alone; exact gradients take twice that. `bytes_per_token_chunk`: recurrent
    states at a border. Both None where the meta device cannot run the model. `positions`: how many the model knows.
    """

    name: str
    report: RolloutReport
    parameters: int
    hidden_size: int
    num_layers: int
    vocabulary: int
    positions: int | None
    dtype: torch.dtype
    bytes_per_token: int | None
    bytes_per_token_chunk: int | None

    def longest(
        self, memory_bytes: int, *, gradient: Literal["exact", "truncated"], chunk_size: int
    ) -> int | None:
        """About how many tokens one sequence can have on a GPU with so much memory, all weights trained with AdamW.

        The rest after weights and one token chunk's activations, by what a token leaves behind, cut to the positions
        that the model knows. 0 where not even the weights fit; None where sizes are unknown.
        """
        if self.bytes_per_token is None or self.bytes_per_token_chunk is None:
            return None
        copies = 2 if gradient == "exact" else 1
        per_token = copies * self.bytes_per_token + self.bytes_per_token_chunk / chunk_size
        rest = memory_bytes - BYTES_PER_TRAINED_PARAMETER * self.parameters - self._chunk_bytes(chunk_size)
        tokens = int(rest / per_token) if per_token else self.positions or 0
        return max(min(tokens, self.positions or tokens), 0)

    def _chunk_bytes(self, chunk_size: int) -> int:
        """Borders of checkpointed layers, the inside of one, and a block of logits."""
        inside = 24 * self.hidden_size
        return chunk_size * 4 * (self.num_layers * self.hidden_size + inside + min(self.vocabulary, 2**15))


def forecast(config: Any, *, dtype: torch.dtype = torch.bfloat16) -> Forecast:
    """What the rollout will do with a causal language model of this configuration.

    Raises UnsupportedModelError for a configuration that transformers builds no causal language model from.
    """
    text = config.get_text_config(decoder=True)
    model = _without_values(config, dtype)
    per_token, per_chunk = _carry_sizes(model)
    positions = getattr(text, "max_position_embeddings", None)
    return Forecast(
        name=f"{text.model_type} ({type(model).__name__})",
        report=_report_of_miniature(text),
        parameters=sum(p.numel() for p in model.parameters()),
        hidden_size=int(text.hidden_size),
        num_layers=int(text.num_hidden_layers),
        vocabulary=int(text.vocab_size),
        positions=positions if isinstance(positions, int) else None,
        dtype=dtype,
        bytes_per_token=per_token,
        bytes_per_token_chunk=per_chunk,
    )


def carry_bytes(
    config: Any, num_tokens: int, chunk_size: int, *, exact: bool, dtype: torch.dtype
) -> int | None:
    """What one row of so many tokens leaves behind: keys, values and, where gradients are exact, theirs; and states at
    the borders of token chunks. None where that is unknown. Raises UnsupportedModelError as `forecast` does.
    """
    per_token, per_chunk = _carry_sizes(_without_values(config, dtype))
    if per_token is None or per_chunk is None:
        return None
    return num_tokens * per_token * (2 if exact else 1) + -(-num_tokens // chunk_size) * per_chunk


def _without_values(config: Any, dtype: torch.dtype) -> nn.Module:
    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(_runs_anywhere(config), dtype=dtype)
    except _FAULTS as error:
        raise UnsupportedModelError(
            f"{config.model_type}: transformers builds no causal language model from this configuration "
            f"({type(error).__name__}: {_first_line(error)})."
        ) from error
    return model


def _report_of_miniature(config: Any) -> RolloutReport:
    try:
        model = small_model(config)
    except ValueError as error:
        reason = f"{config.model_type}: no small model of this architecture could be built to try it on "
        cause = error.__cause__ or error
        return RolloutReport(False, False, (f"{reason}({type(cause).__name__}: {_first_line(cause)}).",))
    return probe_model(model)


def _carry_sizes(model: nn.Module) -> tuple[int | None, int | None]:
    """Bytes of keys and values a token, and of states at a border, of one row."""
    try:
        lm = CausalLM(model)
        carry = KVCarry(lm.config, _FEW, None, with_gradient=False)
        carry.seek(0, writing=True)
        tokens = torch.zeros(1, _FEW, dtype=torch.long, device="meta")
        with torch.no_grad():
            lm.fill({"input_ids": tokens, "position_ids": torch.arange(_FEW, device="meta")[None]}, carry)
            carry.seek(_FEW, writing=True)
        if carry.unused_layers():
            _log.info(
                f"{type(model).__name__}: sizes of its carry are unknown (it takes no notice of a cache)"
            )
            return None, None
        return carry.token_bytes() // _FEW, carry.border_bytes()
    except (UnsupportedModelError, *_FAULTS) as error:
        _log.info(f"{type(model).__name__}: sizes of its carry are unknown ({type(error).__name__}: {error})")
        return None, None


def _runs_anywhere(config: Any) -> Any:
    """The configuration for a model whose experts are chosen without looking at values, which meta tensors lack."""
    changed = copy.deepcopy(config)
    for part in (changed, changed.get_text_config(decoder=True)):
        setattr(part, _EXPERTS, "batched_mm")
    return changed


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")
