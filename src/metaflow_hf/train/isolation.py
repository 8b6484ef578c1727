"""Does a model keep documents apart that are packed into one sequence? Tried on a few random tokens."""

from typing import Any

import torch
from torch import Tensor, nn

from metaflow_hf.errors import UnsupportedModelError

_TOKENS = 7


def require_isolation(model: nn.Module) -> None:
    """Raises ``UnsupportedModelError`` for a model in which a packed document sees the one before it.

    transformers keeps documents apart by positions that begin anew; models that carry a state along (Mamba, linear
    attention) or make their own masks do not know of that. Two passes over a few tokens; nothing is changed.
    """
    vocabulary = _vocabulary(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (3, _TOKENS), generator=generator)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            first, second = (_packed_logits(model, ids[[before, 2]].to(device)) for before in (0, 1))
    except TypeError as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} takes no positions ({error}), so packed documents cannot be kept apart: set "
            "data.packing to true or false."
        ) from error
    finally:
        model.train(was_training)
    # The same document after two others.
    scale = float(first.abs().max()) or 1.0
    if float((first - second).abs().max()) > 1e-3 * scale:
        raise UnsupportedModelError(
            f"{type(model).__name__} lets packed documents see each other, whatever their positions: set data.packing "
            "to true (they then do, with an end-of-text token between them) or false."
        )


def _packed_logits(model: nn.Module, documents: Tensor) -> Tensor:
    positions = torch.arange(_TOKENS, device=documents.device).repeat(len(documents))
    logits: Tensor = model(
        input_ids=documents.reshape(1, -1), position_ids=positions[None], use_cache=False
    ).logits
    return logits[0, -_TOKENS:].float()


def _vocabulary(model: nn.Module) -> int:
    transformers_model: Any = model
    return int(transformers_model.get_input_embeddings().weight.shape[0])
