"""A causal language model as the rollout sees it: what is inside the wrappers, its backbone and its head."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from metaflow_hf.errors import UnsupportedModelError
from metaflow_hf.rollout.sequence import TokenSequence

_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


class CausalLM:
    """The transformers model inside DDP, torch.compile and PEFT wrappers. Nothing in it is changed.

    Raises UnsupportedModelError for a model of another kind.
    """

    def __init__(self, model: nn.Module) -> None:
        inner = unwrap(model)
        if not isinstance(inner, PreTrainedModel):
            raise UnsupportedModelError(
                f"{type(inner).__name__} is neither a transformers model nor one with a recurrent carry "
                "(initial_carry(batch), forward(carry, batch)): it cannot be rolled out in token chunks."
            )
        self.model: Any = inner
        self.config = inner.config.get_text_config(decoder=True)
        self.head = inner.get_output_embeddings()
        self.device = inner.device
        self.name = f"{self.config.model_type} ({type(inner).__name__})"
        parameters = inspect.signature(inner.forward).parameters
        self.takes_positions = "position_ids" in parameters
        self._cache_name = "cache_params" if "cache_params" in parameters else "past_key_values"

    def fill(self, inputs: dict[str, Tensor], cache: Any) -> None:
        """Runs the backbone alone, for the states of these tokens that it leaves in `cache`."""
        self._run(self.model.base_model, inputs, cache)

    def hidden(self, inputs: dict[str, Tensor], cache: Any) -> Tensor:
        """The backbone's last hidden states [B, C, H] of the tokens in `inputs`, given the past in `cache`."""
        states: Tensor = self._run(self.model.base_model, inputs, cache).last_hidden_state
        return states

    def logits(self, inputs: dict[str, Tensor], cache: Any) -> Tensor:
        """Logits [B, C, V] of the tokens in `inputs`, given the past in `cache`."""
        logits: Tensor = self._run(self.model, inputs, cache).logits
        return logits

    def trainable(self) -> bool:
        """Whether any parameter takes a gradient."""
        return any(parameter.requires_grad for parameter in self.model.parameters())

    def _run(self, module: Any, inputs: dict[str, Tensor], cache: Any) -> Any:
        if not self.takes_positions:
            inputs = {key: value for key, value in inputs.items() if key != "position_ids"}
        given = {**inputs, self._cache_name: cache}
        return module(**given, use_cache=cache is not None, return_dict=True)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP, torch.compile and PEFT (adapters in place stay in force).

    Raises UnsupportedModelError for wrappers whose own forward pass has to run: sharded parameters, DataParallel.
    """
    if isinstance(model, (FSDPModule, FullyShardedDataParallel, nn.DataParallel)):
        raise UnsupportedModelError(
            f"{type(model).__name__}: its parameters are gathered by its own forward pass, which token chunks do "
            "not run. Use one whole model per GPU, DDP-wrapped or not."
        )
    if isinstance(model, DistributedDataParallel):
        return unwrap(model.module)
    compiled_from = getattr(model, "_orig_mod", None)
    if isinstance(compiled_from, nn.Module):
        return unwrap(compiled_from)
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        adapter: Any = model.active_peft_config
        if adapter.is_prompt_learning:
            raise UnsupportedModelError(
                f"{type(adapter).__name__}: virtual tokens stand before the whole sequence and cannot be cut "
                "into token chunks. Use an adapter that changes layers in place, such as LoRA."
            )
        return unwrap(model.get_base_model())  # type: ignore[operator]
    return model


def refuse_blind_predictions(lm: CausalLM, sequence: TokenSequence) -> None:
    """Raises UnsupportedModelError where left padding predicts a token and the result depends on chunking.

    A padded token at the left sees nothing. transformers' eager attention then attends to all tokens alike,
    later ones too; its other attentions give zero.
    """
    if sequence.attention_mask is None or getattr(lm.config, "_attn_implementation", None) != "eager":
        return
    blind = (sequence.attention_mask.cumsum(dim=1) == 0) & (sequence.targets != sequence.ignore_index)
    if blind.any():
        raise UnsupportedModelError(
            f"{lm.name}: row {int(blind.nonzero()[0, 0])} has a label on its first token, which left padding "
            "would have to predict, and eager attention lets padding see all tokens, later ones too. Set that "
            f"label to {sequence.ignore_index}, pad on the right, or load the model with "
            'attn_implementation="sdpa".'
        )


def refuse_by_configuration(lm: CausalLM) -> None:
    """Raises UnsupportedModelError for what the configuration alone tells cannot be rolled out exactly."""
    if lm.model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{lm.name}: an encoder-decoder model; the rollout takes causal language models."
        )
    if lm.head is None:
        raise UnsupportedModelError(f"{lm.name}: no language-model head (get_output_embeddings() is None).")
    if getattr(lm.config, "output_router_logits", False):
        raise UnsupportedModelError(
            f"{lm.name}: the MoE router's load-balancing loss is not a sum over token chunks. Set "
            "output_router_logits to false in the model's configuration."
        )
    rope = getattr(lm.config, "rope_parameters", None) or {}
    kinds = {str(part.get("rope_type")) for part in (rope, *rope.values()) if isinstance(part, dict)}
    if found := sorted(kind for kind in kinds if any(word in kind for word in _LENGTH_DEPENDENT_ROPE)):
        raise UnsupportedModelError(
            f"{lm.name}: rope of type {', '.join(found)} depends on the length of the whole sequence, which a "
            "token chunk does not know. Use default, linear, yarn or llama3 rope."
        )
