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
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn

from metaflow_hf.config import TrainConfig
from metaflow_hf.data.batches import Batch, Document, encode_rows, make_batches
from metaflow_hf.data.ledger import Claim
from metaflow_hf.data.order import ClaimOrder
from metaflow_hf.errors import NonFiniteLoss
from metaflow_hf.store.objects import Digest
from metaflow_hf.train.delta import delta_layouts, encode_delta
from metaflow_hf.train.inner import inner_layouts, inner_tensors, load_inner
from metaflow_hf.train.models import compute_dtype, load_weights, trained_parameters
from metaflow_hf.train.records import Encoding
from metaflow_hf.train.tensors import TensorReader, write_tensors

logger = logging.getLogger("metaflow_hf.train")

TOKEN_CHUNK: Final = 2048

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


class RowReader(Protocol):
    """Where the rows of a claim come from; ``BlockManager`` is one."""

    def read_rows(self, block_id: int, start: int, stop: int) -> list[dict[str, Any]]: ...


class ModelTrainer:
    """The ``Trainer`` of a causal language model with AdamW."""

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
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        self._model = model.to(device).train()
        # Every pass over a token chunk begins with its embeddings, so a long sequence is seen to move.
        embeddings: nn.Module = getattr(model, "get_input_embeddings", lambda: model)()
        embeddings.register_forward_hook(lambda *_: progress())
        self._tokenizer = tokenizer
        self._rows = rows
        self._order = order
        self._config = config
        self._text_column = text_column
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
        batches = [batch for batch in self.batches(claim) if batch.num_tokens]
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
        rows = self._rows.read_rows(claim.block_id, claim.start, claim.stop)
        ordered = [rows[index] for index in self._order.row_order(claim.position)]
        documents = encode_rows(ordered, self._tokenizer, text_column=self._text_column)
        if self._config.rollout.use_chunked_training is not True:
            return self._cut(documents, "split")
        return self._cut([piece for item in documents for piece in self._within_positions(item)], "rollout")

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
        inputs = {name: tensor.to(self._device) for name, tensor in batch.to_mapping().items()}
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
        return use is not False and batch.input_ids.shape[1] > self._token_chunk

    @property
    def _token_chunk(self) -> int:
        size = self._config.rollout.chunk_size
        return TOKEN_CHUNK if size == "auto" else size

    def _within_positions(self, document: Document) -> Iterator[Document]:
        """The document whole, or in pieces that (with their end) fit the positions that the model knows."""
        known = getattr(getattr(self._model, "config", None), "max_position_embeddings", None)
        length = max(known - 1, 1) if isinstance(known, int) else len(document.input_ids)
        for start in range(0, len(document.input_ids), max(length, 1)):
            piece = slice(start, start + length)
            yield Document(document.input_ids[piece], document.labels[piece])

    def _cut(self, documents: list[Document], long_documents: Any) -> list[Batch]:
        data = self._config.data
        return make_batches(
            documents,
            sequence_length=data.sequence_length,
            batch_size=data.batch_size,
            packing=data.packing,
            eos_token_id=self._tokenizer.eos_token_id,
            pad_token_id=self._tokenizer.pad_token_id,
            long_documents=long_documents,
        )

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
