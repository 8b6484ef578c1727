"""What a worker does with a claim: rows -> documents -> batches -> optimiser steps.

Training a claim is a function of weights, optimiser state, position and learning rates alone: dropout is seeded
by the run's seed and the position, so it does not matter which worker trains it, or after which restart.
"""

import logging
import math
import resource
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from metaflow_hf.config import TrainConfig
from metaflow_hf.data.batches import Batch
from metaflow_hf.data.ledger import Claim
from metaflow_hf.data.order import ClaimOrder
from metaflow_hf.data.sizes import token_chunk_size
from metaflow_hf.errors import NonFiniteLoss
from metaflow_hf.store.objects import Digest
from metaflow_hf.train.delta import delta_layouts, encode_delta
from metaflow_hf.train.feed import Feed, RowReader
from metaflow_hf.train.inner import inner_layouts, inner_tensors, load_inner
from metaflow_hf.train.isolation import require_isolation
from metaflow_hf.train.models import compute_dtype, known_positions, load_weights, trained_parameters
from metaflow_hf.train.records import Encoding
from metaflow_hf.train.tensors import TensorReader, write_tensors

logger = logging.getLogger("metaflow_hf.train")

LearningRate = Callable[[float, int], float]


@dataclass(frozen=True, slots=True)
class Step:
    """One optimiser step: mean loss in nats per counted token, tokens, and the part of the claim it ends at."""

    loss: float
    tokens: int
    learning_rate: float
    part: float


class Trainer(Protocol):
    """What the loop of a worker needs of whatever is trained."""

    def load(self, weights: Path, inner: Path | None) -> None:
        """Continues from a round's weights, and from a stored optimiser state where one is given."""
        ...

    def train(self, claim: Claim, learning_rate: LearningRate) -> Iterator[Step]:
        """Trains one claim, step by step; ``learning_rate(part, tokens)`` gives that of the next step."""
        ...

    def keep(self) -> None:
        """Remembers the weights of this moment as those to write: all claims up to now are finished."""
        ...

    def write(self, path: Path, base: Path, encoding: Encoding) -> Digest:
        """Writes the kept weights as a contribution against ``base``."""
        ...

    def write_inner(self, path: Path) -> Digest:
        """Writes the optimiser's state of this moment."""
        ...

    def memory_bytes(self) -> int:
        """The most memory used so far: the GPU's, else the process's."""
        ...


class ModelTrainer:
    """The ``Trainer`` of a causal language model with AdamW.

    ``foresee`` names the claim that will probably come next: its rows are read and tokenized in a thread while the
    one in hand is trained. A wrong guess costs that work and changes nothing else. ``close`` ends the thread.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        rows: RowReader,
        order: ClaimOrder,
        config: TrainConfig,
        *,
        text_column: str,
        device: torch.device,
        held_out: frozenset[bytes] = frozenset(),
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        self._model = model.to(device).train()
        if config.data.packing == "isolated":
            require_isolation(self._model)
        # Every pass over a token chunk begins with its embeddings, so a long sequence is seen to move.
        embeddings: nn.Module = getattr(model, "get_input_embeddings", lambda: model)()
        embeddings.register_forward_hook(lambda *_: progress())
        self._feed = Feed(
            rows,
            order,
            tokenizer,
            config,
            text_column=text_column,
            max_positions=known_positions(model),
            held_out=held_out,
        )
        self.foresee: Callable[[], Claim | None] = lambda: None
        self._config = config
        self._device = device
        self._dtype = compute_dtype(config.model, device)
        self._parameters = trained_parameters(self._model)
        self._optimizer = make_optimizer(self._parameters, config)
        self._kept: dict[str, Tensor] = {}

    def load(self, weights: Path, inner: Path | None) -> None:
        with TensorReader(weights) as reader:
            load_weights(self._parameters, reader)
        if inner is not None:
            with TensorReader(inner) as reader:
                load_inner(reader, self._parameters, self._optimizer)

    def train(self, claim: Claim, learning_rate: LearningRate) -> Iterator[Step]:
        batches = [batch for batch in self._feed.take(claim) if batch.num_tokens]
        if (following := self.foresee()) is not None:
            self._feed.prepare(following)
        tokens = 0
        seed_devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=seed_devices):
            torch.manual_seed(_seed(self._config.data.seed, claim.position))
            for number, batch in enumerate(batches):
                rate = learning_rate(number / len(batches), tokens)
                loss = self._step(batch, rate)
                if not math.isfinite(loss):
                    raise NonFiniteLoss(
                        f"the loss became {loss} in step {number + 1} of position {claim.position} (block "
                        f"{claim.block_id}, rows {claim.start} to {claim.stop}): lower optimizer.learning_rate or "
                        "optimizer.max_grad_norm, or look at these rows."
                    )
                tokens += batch.num_tokens
                yield Step(loss, batch.num_tokens, rate, (number + 1) / len(batches))

    def batches(self, claim: Claim) -> list[Batch]:
        """The batches of a claim: a function of its rows, the tokenizer and the configuration."""
        return self._feed.batches(claim)

    def close(self) -> None:
        """Ends the thread that works ahead; idempotent."""
        self._feed.close()

    def keep(self) -> None:
        for name, parameter in self._parameters.items():
            if name in self._kept:
                self._kept[name].copy_(parameter.detach())
            else:
                self._kept[name] = parameter.detach().cpu().clone()

    def write(self, path: Path, base: Path, encoding: Encoding) -> Digest:
        shapes = {name: tuple(tensor.shape) for name, tensor in self._kept.items()}
        with TensorReader(base) as reader:
            return write_tensors(
                path, delta_layouts(shapes, encoding), encode_delta(self._kept, reader, encoding)
            )

    def write_inner(self, path: Path) -> Digest:
        tensors = inner_tensors(self._parameters, self._optimizer)
        return write_tensors(path, inner_layouts(self._parameters), tensors)

    def memory_bytes(self) -> int:
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def _step(self, batch: Batch, learning_rate: float) -> float:
        loss = self._loss_and_gradients(batch)
        if math.isfinite(loss):
            nn.utils.clip_grad_norm_(self._parameters.values(), self._config.optimizer.max_grad_norm)
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss

    def _loss_and_gradients(self, batch: Batch) -> float:
        inputs = {
            name: value.to(self._device) if isinstance(value, Tensor) else value
            for name, value in batch.to_mapping().items()
        }
        with self._autocast():
            if self._is_rolled_out(batch):
                return self._roll_out(inputs)
            loss: Tensor = self._model(**inputs).loss
        loss.backward()
        return float(loss.detach())

    def _roll_out(self, inputs: Mapping[str, Tensor]) -> float:
        from metaflow_hf.rollout import chunked_segment_rollout

        rollout = self._config.rollout
        loss, _ = chunked_segment_rollout(
            self._model,
            inputs,
            chunk_size=self._token_chunk,
            gradient=rollout.gradient,
            use_cpu_offload=rollout.use_cpu_offload,
            gradient_checkpointing=rollout.gradient_checkpointing,
            backward=True,
        )
        return float(loss)

    def _is_rolled_out(self, batch: Batch) -> bool:
        use = self._config.rollout.use_chunked_training
        # A cache does not keep isolated documents apart.
        together = batch.position_ids is None
        return use is not False and together and batch.input_ids.shape[1] > self._token_chunk

    @cached_property
    def _token_chunk(self) -> int:
        rollout = self._config.rollout
        if rollout.chunk_size != "auto":
            return rollout.chunk_size
        on_gpu = self._device.type == "cuda"
        memory = torch.cuda.get_device_properties(self._device).total_memory if on_gpu else None
        return token_chunk_size(memory, exact=rollout.gradient == "exact")

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self._device.type, dtype=self._dtype)


def make_optimizer(parameters: Mapping[str, nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices only, as usual for language models."""
    settings = config.optimizer
    groups = [
        {"params": [p for p in parameters.values() if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
    )


def _seed(seed: int, position: int) -> int:
    # Any two runs with seeds below 2**31 draw differently at every position.
    return (seed << 32) + position
