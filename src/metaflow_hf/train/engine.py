"""Weights, gradients and optimiser of one worker: in this process alone, or in one process per GPU that all do the same.

Every method is called by all processes of a worker, in the same order and with the same arguments (see ``team``); each
takes its own rows of a batch. The result is the same step, however many they are.
"""

import math
import resource
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from metaflow_hf.config import TrainConfig
from metaflow_hf.data.batches import Batch
from metaflow_hf.store.objects import Digest
from metaflow_hf.train.delta import delta_layouts, encode_delta
from metaflow_hf.train.gradients import Gradients
from metaflow_hf.train.inner import inner_tensors, read_inner, write_inner
from metaflow_hf.train.models import load_weights, trained_parameters
from metaflow_hf.train.optimizers import make_optimizer
from metaflow_hf.train.records import Encoding
from metaflow_hf.train.sharding import Replicas, whole
from metaflow_hf.train.tensors import TensorReader, write_tensors

# Gradients that overflow with less are not too large for fp16 alone.
SMALLEST_SCALE: Final = 1.0


class Engine:
    """What trains: ``step`` moves the weights, ``keep`` and ``write`` give them away."""

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        device: torch.device,
        *,
        replicas: Replicas | None = None,
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        self.settings = config.optimizer
        self.device = device
        # With several processes the model may be larger than the device: it is moved as it is wrapped.
        self.model = (model if replicas else model.to(device)).train()
        if config.model.compile:
            self.model.compile()
        else:
            # Every pass over a token chunk begins with its embeddings, so a long sequence is seen to move.
            embeddings: nn.Module = getattr(model, "get_input_embeddings", lambda: model)()
            embeddings.register_forward_hook(lambda *_: progress())
        self._replicas = replicas
        wrapped = replicas.wrap(self.model) if replicas else self.model
        self.parameters = trained_parameters(self.model)
        self.optimizer = make_optimizer(self.parameters, self.settings, self.model)
        self.gradients = Gradients(self.model, wrapped, config, device, replicas)
        half = self.gradients.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(device.type) if half else None
        self.kept: dict[str, Tensor] = {}

    def load(self, weights: Path, inner: Path | None) -> None:
        """Continues from a round's weights, and from a stored optimiser state where one is given."""
        with TensorReader(weights) as reader:
            load_weights(self.parameters, reader)
        if inner is not None:
            with TensorReader(inner) as reader:
                read_inner(reader, self.parameters, self.optimizer, self.scaler)

    def step(self, batches: Sequence[Batch], learning_rate: float) -> tuple[float, float]:
        """One step of the optimiser: the mean loss and the norm of the gradients. Nothing moves unless both are finite."""
        scale_before = self.scaler.state_dict() if self.scaler is not None else {}
        loss, norm = self._loss_and_norm(batches)
        while self._overflowed(loss, norm):
            self.optimizer.zero_grad(set_to_none=True)
            loss, norm = self._loss_and_norm(batches)
        if math.isfinite(loss) and math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
        elif self.scaler is not None:
            # The scale was not the reason, and steps that are well would lose their small gradients with less.
            self.scaler.load_state_dict(scale_before)
        self.optimizer.zero_grad(set_to_none=True)
        return loss, norm

    def seed(self, seed: int) -> None:
        """Sets the randomness of what follows: dropout of the rows of each process is its own."""
        rank = self._replicas.rank if self._replicas else 0
        torch.manual_seed((seed + rank * 0x9E3779B97F4A7C15) % 2**64)

    def keep(self) -> None:
        """Remembers the weights of this moment as those to write."""
        for name, parameter in self.parameters.items():
            value = whole(parameter.detach())
            if self._replicas is not None and self._replicas.rank:
                continue
            if name in self.kept:
                self.kept[name].copy_(value)
            else:
                self.kept[name] = value.to("cpu", copy=True)

    def write(self, path: Path, base: Path, encoding: Encoding) -> Digest:
        """Writes the kept weights as a contribution against ``base``; of the first process alone."""
        shapes = {name: tuple(tensor.shape) for name, tensor in self.kept.items()}
        with TensorReader(base) as reader:
            layouts = delta_layouts(shapes, encoding)
            return write_tensors(path, layouts, encode_delta(self.kept, reader, encoding))

    def write_inner(self, path: Path) -> Digest | None:
        """Writes the optimiser's state of this moment, in the first process; the others give their parts to it."""
        if self._replicas is None or self._replicas.rank == 0:
            return write_inner(path, self.parameters, self.optimizer, self.scaler)
        for _ in inner_tensors(self.parameters, self.optimizer, self.scaler):
            pass
        return None

    def memory_bytes(self) -> int:
        """The most memory used so far: the GPU's, else the process's."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def _loss_and_norm(self, batches: Sequence[Batch]) -> tuple[float, float]:
        tokens = sum(batch.num_tokens for batch in batches)
        if self.scaler is None:
            return self.gradients.add(batches, tokens=tokens), self._clip()
        loss = self.gradients.add(batches, tokens=tokens, scale=self.scaler.get_scale())
        # The factor is in the gradients already; this makes the scaler know its device.
        self.scaler.scale(torch.zeros((), device=self.device))
        self.scaler.unscale_(self.optimizer)
        norm = self._clip()
        self.scaler.update()
        return loss, norm

    def _overflowed(self, loss: float, norm: float) -> bool:
        """Whether gradients were too large for fp16 only, so that the step is worth repeating with half the scale."""
        if self.scaler is None or not math.isfinite(loss) or math.isfinite(norm):
            return False
        return self.scaler.get_scale() >= SMALLEST_SCALE

    def _clip(self) -> float:
        limit = self.settings.max_grad_norm
        gradients = self.parameters.values()
        if limit is not None:
            return float(whole(nn.utils.clip_grad_norm_(gradients, limit)))
        return float(whole(nn.utils.get_total_norm([p.grad for p in gradients if p.grad is not None])))
