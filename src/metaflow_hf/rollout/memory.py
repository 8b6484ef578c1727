"""How long a token chunk can be in the memory that a device has left.

What a chunk needs grows with its tokens by what its graph keeps, which is counted on a few tokens: every
tensor saved for the backward pass that is not a parameter. On top come the carry, unless it lies in host
memory, and what the head and the largest weight's gradient need for a moment.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from metaflow_hf.rollout.causal_lm import CausalLM
from metaflow_hf.rollout.loss import logits_block_bytes
from metaflow_hf.rollout.probe import require
from metaflow_hf.rollout.rng import rng_kept
from metaflow_hf.rollout.sequence import TokenSequence
from metaflow_hf.rollout.settings import own_checkpointing_off, wants_checkpointing
from metaflow_hf.rollout.trial import RolloutReport

_log = logging.getLogger("metaflow_hf.rollout")

SMALLEST_TOKENS = 256
LARGEST_TOKENS = 16_384  # matrix products gain nothing from more
_TRIAL_TOKENS = 64
_USABLE = 0.9  # of what is free: fragmentation, workspaces of libraries
_PASSING = 3  # blocks of logits at once: themselves, their softmax and a copy in another type
_STAGING_BYTES = 8 * 64 * 2**20  # two areas of keys, values and their gradients


class ChunkSizer:
    """Finds the longest token chunk, a power of two from 256 to 16,384 tokens, that fits beside the carry.

    What a chunk costs a token is counted once per batch size, in a forward pass over 64 tokens; what is free
    is asked each time. Raises UnsupportedModelError for a model that cannot be rolled out.
    """

    def __init__(
        self, model: nn.Module, *, exact: bool, use_cpu_offload: bool, gradient_checkpointing: bool
    ) -> None:
        self._lm = CausalLM(model)
        self._report = require(model, exact=exact)
        self._exact = exact
        self._offload = use_cpu_offload
        self._checkpointed = gradient_checkpointing or use_cpu_offload or wants_checkpointing(self._lm.model)
        self._per_token: dict[int, float] = {}
        self._said: set[int] = set()

    def tokens(self, batch_size: int, num_tokens: int, free_bytes: int | None = None) -> int:
        """Tokens a chunk for sequences [batch_size, num_tokens]. Logged, each result once.

        `free_bytes`: on the model's device; default what it has left now, with what torch holds unused. Where
        not even 256 tokens fit, 256 with a warning that says what would help.
        """
        free = free_device_bytes(self._lm.device) if free_bytes is None else free_bytes
        fixed = self._fixed_bytes(batch_size, num_tokens)
        per_token = self._per_token.get(batch_size) or kept_bytes_per_token(
            self._lm, self._report, batch_size, checkpointed=self._checkpointed
        )
        self._per_token[batch_size] = per_token
        tokens = int((free * _USABLE - fixed) // per_token)
        chosen = min(max(2 ** (max(tokens, 1).bit_length() - 1), SMALLEST_TOKENS), LARGEST_TOKENS)
        if chosen not in self._said:
            self._said.add(chosen)
            _log.info(
                f"chunk_size: auto is {chosen:,} tokens: {free / 2**30:.1f} GiB free, {fixed / 2**30:.1f} GiB "
                f"for {num_tokens:,} tokens whatever the chunk, {per_token / 2**10:.0f} KiB a token of a chunk"
            )
            if tokens < SMALLEST_TOKENS:
                advice = "a smaller batch" if self._offload else "use_cpu_offload: true"
                _log.warning(f"{num_tokens:,} tokens will hardly fit in {free / 2**30:.1f} GiB; try {advice}")
        return chosen

    def _fixed_bytes(self, batch_size: int, num_tokens: int) -> int:
        """Carry or staging areas, gradients not there yet, and the largest moment outside of the layers."""
        carry = self._report.bytes_per_token * batch_size * num_tokens // (1 if self._exact else 2)
        parameters = list(self._lm.model.parameters())
        gradients = sum(p.nbytes for p in parameters if p.requires_grad and p.grad is None)
        head = _PASSING * logits_block_bytes(self._lm.device) + 2 * max(p.nbytes for p in parameters)
        return (_STAGING_BYTES if self._offload else carry) + gradients + head


def free_device_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on an accelerator: free ones, and those torch holds for later."""
    module: Any = torch.get_device_module(device)
    free: int = module.mem_get_info(device)[0]
    return free + int(module.memory_reserved(device)) - int(module.memory_allocated(device))


def kept_bytes_per_token(
    lm: CausalLM, report: RolloutReport, batch_size: int, *, checkpointed: bool
) -> float:
    """Bytes that one more token in a chunk (of all rows) costs at the peak of its backward pass."""
    vocabulary = lm.model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(_TRIAL_TOKENS, device=lm.device).remainder(vocabulary).expand(batch_size, -1)
    inputs = TokenSequence.from_batch({"input_ids": ids}, -100, lm.device).model_inputs(0, _TRIAL_TOKENS)
    kept = _KeptBytes({parameter.untyped_storage().data_ptr() for parameter in lm.model.parameters()})
    with rng_kept(lm.device), own_checkpointing_off(lm.model), torch.enable_grad(), kept.counted():
        states = (lm.hidden if report.linear_head else lm.logits)(inputs, None)
    layers = sum(isinstance(module, GradientCheckpointingLayer) for module in lm.model.modules())
    if not checkpointed or not layers:
        return (kept.nbytes + kept.nbytes / max(layers, 1)) / _TRIAL_TOKENS
    # each layer's input and attention output; one layer in full, and the gradients of what it keeps
    width = lm.config.hidden_size * states.element_size() * batch_size
    return 2 * layers * width + 2 * kept.nbytes / layers / _TRIAL_TOKENS


class _KeptBytes:
    """Bytes of the tensors that a graph saves, each storage once, those `outside` left out."""

    def __init__(self, outside: set[int]) -> None:
        self._seen = outside
        self.nbytes = 0

    def counted(self) -> Any:
        return torch.autograd.graph.saved_tensors_hooks(self._count, lambda tensor: tensor)

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.nbytes += storage.nbytes()
        return tensor
