"""How much memory one worker will need, by part, and how much a run will store: counted on a model without values."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from metaflow_hf.config import TrainConfig
from metaflow_hf.data.sizes import token_chunk_size
from metaflow_hf.errors import UnsupportedModelError
from metaflow_hf.train.architecture import read_architecture
from metaflow_hf.train.models import load_model, prepare
from metaflow_hf.train.optimizers import bytes_per_parameter

logger = logging.getLogger("metaflow_hf.train")

FP32_BYTES: Final = 4
# A worker's weights as they were when a claim ended, on the host.
ROUNDS_KEPT: Final = 2


def memory_of_worker(model_dir: Path, config: TrainConfig, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of ``weights``, ``gradients``, ``optimizer`` and ``activations`` of one batch, and of the ``carry`` of a
    sequence that is rolled out (keys and values of the past and their gradients, and recurrent states).

    Nothing is computed: the model is on torch's meta device. Activations are what autograd keeps, with attention that
    keeps no matrix of scores; 0 where that could not be told.
    """
    model = _without_values(model_dir, config, torch.float32)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    width = dtype.itemsize if config.model.lora else FP32_BYTES
    length, carry = config.data.sequence_length, 0
    chunk = token_chunk(config)
    if config.rollout.use_chunked_training is not False and length > chunk:
        found = _carry_bytes(model_dir, config, dtype, chunk)
        # One that leaves nothing behind, as far as can be told, is trained whole.
        carry, length = (0, length) if found is None else (found, chunk)
    return {
        "weights": trained * FP32_BYTES + frozen * width,
        "gradients": trained * FP32_BYTES,
        "optimizer": trained * bytes_per_parameter(config.optimizer),
        "activations": _activation_bytes(model_dir, config, dtype, (config.data.batch_size, length)),
        "carry": carry,
    }


def disk_of_run(
    trained: int, parameters: int, config: TrainConfig, *, rounds: int, exported: torch.dtype
) -> dict[str, int]:
    """Bytes that a lineage keeps in the datastore while it trains (``rounds``), and its ``result`` in ``exported``.

    Two rounds are kept unless all are: weights, momentum of the outer step, one optimiser's state and the moving
    average where one is wanted, and a contribution of each worker.
    """
    workers = config.rounds.workers
    delta = FP32_BYTES if workers == 1 or config.rounds.encoding == "fp32" else 1
    state = FP32_BYTES + (FP32_BYTES if workers > 1 else 0) + bytes_per_parameter(config.optimizer)
    state += FP32_BYTES if config.rounds.ema_half_life is not None else 0
    kept = max(rounds, ROUNDS_KEPT) if config.rounds.keep == "all" else ROUNDS_KEPT
    is_adapter = config.model.lora is not None and config.model.lora.save == "adapter"
    return {
        "rounds": kept * trained * (state + workers * delta),
        "result": trained * FP32_BYTES if is_adapter else parameters * exported.itemsize,
    }


def token_chunk(config: TrainConfig) -> int:
    """Tokens of one pass of the rollout on this machine: longer sequences go through it."""
    size = config.rollout.chunk_size
    if size != "auto":
        return size
    memory = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    return token_chunk_size(memory, exact=config.rollout.gradient == "exact")


def _without_values(model_dir: Path, config: TrainConfig, dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        return prepare(
            load_model(model_dir, config.model, initialise=True, dtype=dtype), config.model
        ).train()


def _activation_bytes(
    model_dir: Path, config: TrainConfig, dtype: torch.dtype, shape: tuple[int, int]
) -> int:
    model: Any = _without_values(model_dir, config, dtype)
    own = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}  # noqa: SLF001
    kept: dict[int, tuple[int, Any]] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:  # noqa: SLF001
            # The storage itself is kept as well, so that its address is not given out again.
            kept[storage._cdata] = (storage.nbytes(), storage)  # noqa: SLF001
        return tensor

    ids = torch.zeros(shape, dtype=torch.long, device="meta")
    try:
        with _LeanAttention(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(input_ids=ids, labels=ids)
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        # Models that look at values on the way cannot run without any.
        logger.info("activations of %s cannot be counted: %s", type(model).__name__, error)
        return 0
    return sum(size for size, _ in kept.values())


def _carry_bytes(model_dir: Path, config: TrainConfig, dtype: torch.dtype, chunk: int) -> int | None:
    """What the whole batch leaves behind; ``None`` where that cannot be told."""
    from metaflow_hf.rollout.forecast import carry_bytes

    try:
        row = carry_bytes(
            read_architecture(model_dir, config.model),
            config.data.sequence_length,
            chunk,
            exact=config.rollout.gradient == "exact",
            dtype=dtype,
        )
    except UnsupportedModelError as error:
        logger.info("the carry of %s cannot be counted: %s", config.model.name, error)
        return None
    return None if row is None else row * config.data.batch_size


class _Attention(torch.autograd.Function):
    """Shapes of an attention that keeps its inputs and its output only, as flash attention does."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(_ctx: Any, *_gradients: Any) -> Any:
        raise NotImplementedError("nothing is computed here")


class _LeanAttention(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            return _Attention.apply(*args[:3])
        return func(*args, **(kwargs or {}))
