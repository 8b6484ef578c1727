"""Loss and gradients of the batches of one step: in the dtype of the computation, long sequences token chunk by token
chunk.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from metaflow_hf.config import TrainConfig
from metaflow_hf.data.batches import Batch
from metaflow_hf.data.sizes import token_chunk_size
from metaflow_hf.train.models import compute_dtype
from metaflow_hf.train.sharding import Replicas

logger = logging.getLogger("metaflow_hf.train")


class Gradients:
    """Forward and backward passes of ``model`` as the configuration wants them.

    With ``replicas`` each process makes those of its own rows, through ``wrapped``, and gets the gradients of all.
    """

    def __init__(
        self,
        model: nn.Module,
        wrapped: nn.Module,
        config: TrainConfig,
        device: torch.device,
        replicas: Replicas | None = None,
    ) -> None:
        self._model: Any = model
        self._wrapped: Any = wrapped
        self._rollout = config.rollout
        self._device = device
        self._replicas = replicas
        self.dtype = compute_dtype(config.model, device)

    def add(self, batches: Sequence[Batch], *, tokens: int, scale: float = 1.0) -> float:
        """Adds the gradients of ``batches`` to those of the model, and returns the mean loss of the ``tokens`` labels in
        them that count; what is added is ``scale`` times the gradient of that.
        """
        # One transfer for all losses: a GPU works ahead meanwhile.
        if self._replicas is None:
            return float(
                torch.stack([self._pass(batch, batch.num_tokens / tokens, scale) for batch in batches]).sum()
            )
        parts = self._add_shares(self._replicas, batches, tokens, scale)
        return float(self._replicas.sum(torch.stack(parts).sum()))

    def _add_shares(
        self, replicas: Replicas, batches: Sequence[Batch], tokens: int, scale: float
    ) -> list[Tensor]:
        if any(map(self._is_rolled_out, batches)):
            # The rollout calls parts of the model, of which no wrapper knows.
            shares = [replicas.share(batch) for batch in batches]
            parts = [self._pass(batch, counted / tokens, scale) for batch, counted in shares if counted]
            replicas.sum_gradients(self._model.parameters())
            return parts or [torch.zeros((), device=self._device)]
        parts = []
        for number, batch in enumerate(batches):
            mine, counted = replicas.share(batch)
            with replicas.syncing(self._wrapped, is_last=number == len(batches) - 1):
                # The wrappers average over the processes.
                part = self._pass(mine, counted / tokens, scale * replicas.size, through=self._wrapped)
            parts.append(part)
        return parts

    def _pass(self, batch: Batch, weight: float, scale: float, *, through: Any = None) -> Tensor:
        """Forward and backward of one batch: its loss times ``weight``, and ``scale`` times the gradient of that."""
        inputs = {
            name: value.to(self._device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in batch.to_mapping().items()
        }
        with self._autocast():
            if self._is_rolled_out(batch):
                return self._roll_out(inputs, batch.num_tokens / (weight * scale)) / scale
            loss: Tensor = (through or self._model)(**inputs).loss
        loss = loss * weight
        (loss * scale).backward()
        return loss.detach().float()

    def _roll_out(self, inputs: Mapping[str, Any], divisor: float) -> Tensor:
        from metaflow_hf.rollout import chunked_segment_rollout

        loss, _ = chunked_segment_rollout(
            self._model,
            {name: value for name, value in inputs.items() if isinstance(value, Tensor)},
            chunk_size=self._fitting_chunk(inputs["input_ids"]),
            gradient=self._rollout.gradient,
            use_cpu_offload=self._rollout.use_cpu_offload,
            gradient_checkpointing=self._rollout.gradient_checkpointing,
            num_items_in_batch=divisor,
            backward=True,
        )
        return loss.detach().float()

    def _is_rolled_out(self, batch: Batch) -> bool:
        use = self._rollout.use_chunked_training
        is_long = use is not False and batch.input_ids.shape[1] > self._token_chunk
        return is_long and (use is True or self._can_be_rolled_out)

    @cached_property
    def _can_be_rolled_out(self) -> bool:
        from metaflow_hf.rollout import probe_model

        report = probe_model(self._model)
        can = report.exact if self._rollout.gradient == "exact" else report.truncated
        if not can:
            logger.warning(
                f"long sequences are trained whole (rollout.use_chunked_training: auto): {report.reasons[0]}"
            )
        return can

    @cached_property
    def _token_chunk(self) -> int:
        if self._rollout.chunk_size != "auto":
            return self._rollout.chunk_size
        on_gpu = self._device.type == "cuda"
        memory = torch.cuda.get_device_properties(self._device).total_memory if on_gpu else None
        return token_chunk_size(memory, exact=self._rollout.gradient == "exact")

    def _fitting_chunk(self, input_ids: Tensor) -> int:
        """With ``auto`` on a GPU what its free memory allows; exact gradients do not depend on it."""
        if (
            self._rollout.chunk_size != "auto"
            or self._rollout.gradient != "exact"
            or self._device.type != "cuda"
        ):
            return self._token_chunk
        return self._sizer.tokens(*input_ids.shape)

    @cached_property
    def _sizer(self) -> Any:
        from metaflow_hf.rollout.memory import ChunkSizer

        return ChunkSizer(
            self._model,
            exact=True,
            use_cpu_offload=self._rollout.use_cpu_offload,
            gradient_checkpointing=self._rollout.gradient_checkpointing,
        )

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self._device.type, dtype=self.dtype)
