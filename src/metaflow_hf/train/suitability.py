"""Whether a model can be trained as a configuration wants it, told from its description, before weights are read.

The model is built without values; what only running it tells is tried on a small model of the same architecture.
"""

import logging
from pathlib import Path
from typing import Any, Final

import torch

from metaflow_hf.config import TrainConfig
from metaflow_hf.errors import HubUnavailable, UnsupportedModelError
from metaflow_hf.rollout import chunked_segment_rollout
from metaflow_hf.rollout.miniature import small_model
from metaflow_hf.train.architecture import find_architecture
from metaflow_hf.train.description import check_length
from metaflow_hf.train.isolation import require_isolation
from metaflow_hf.train.models import load_model, loading, prepare
from metaflow_hf.train.weight_check import check_shapes
from metaflow_hf.train.weight_files import ModelFiles, is_safetensors, tensor_shapes, weight_files

logger = logging.getLogger("metaflow_hf.train")

# Three token chunks and a rest, of two documents.
_TOKENS: Final = 20
_CHUNK: Final = 6


def check_model(model_dir: Path, config: TrainConfig, files: ModelFiles | None = None) -> None:
    """Raises ``UnsupportedModelError`` for a model that cannot be trained like that, and ``ConfigError`` for values of
    ``model.architecture`` or a sequence length that it has no place for.

    ``model_dir`` needs no weights; ``files`` are all the model's, and are compared with its config.json. Passes over a few
    tokens on the CPU; nothing is changed.
    """
    check_length(model_dir, config)
    if files is not None and config.model.initialise == "pretrained":
        _check_weights(model_dir, config, files)
    with torch.device("meta"):
        model = prepare(load_model(model_dir, config.model, initialise=True), config.model)
    is_apart = config.data.packing == "isolated"
    if not is_apart and config.rollout.use_chunked_training is not True:
        return
    try:
        small = small_model(model.config)
    except ValueError as error:
        # The workers find out, with the model itself.
        logger.info("%s is not tried on a small model of its kind: %s", config.model.name, error)
        return
    if is_apart:
        require_isolation(small)
    if config.rollout.use_chunked_training is True:
        _try_rollout(small, config)


def _check_weights(model_dir: Path, config: TrainConfig, files: ModelFiles) -> None:
    """Raises ``UnsupportedModelError`` for weights that cannot be loaded, or do not fit config.json."""
    name, found = config.model.name, find_architecture(model_dir, config.model)
    weights = weight_files(files, name, allow_pickle=config.model.allow_pickle)
    if not is_safetensors(weights) or found.model_class is None:
        # Which tensors a pickle holds, and what a model's own code makes of them, loading tells.
        return
    try:
        shapes = tensor_shapes(files, weights, name)
    except HubUnavailable as error:
        logger.warning("the weights of %s are not compared with its config.json: %s", name, error)
        return
    with loading():
        check_shapes(shapes, found.model_class, found.whole or found.language, name)


def _try_rollout(small: Any, config: TrainConfig) -> None:
    ids = torch.arange(_TOKENS)[None] % small.get_input_embeddings().weight.shape[0]
    batch: dict[str, Any] = {"input_ids": ids}
    if config.data.packing == "isolated":
        batch["position_ids"] = torch.arange(_TOKENS)[None] % (_TOKENS // 2)
    try:
        chunked_segment_rollout(
            small.train(),
            batch,
            chunk_size=_CHUNK,
            gradient=config.rollout.gradient,
            gradient_checkpointing=config.rollout.gradient_checkpointing,
            backward=True,
        )
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"rollout.use_chunked_training: {config.model.name} cannot be trained token chunk by token chunk: "
            f"{str(error).rstrip('.')}. With auto long sequences are trained whole; `metaflow hf doctor --model` tells what a "
            "model can do."
        ) from error
