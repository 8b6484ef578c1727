"""The language model inside of a multimodal model: it is trained as any other, and the rest keeps its weights.

Both share their weights: what is trained in the part is in the whole model, which is what training exports.
"""

from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from metaflow_hf.errors import UnsupportedModelError

_TOKENS: Final = 12
# What transformers and its processors need to read images and sound, beside configuration and tokenizer.
PROCESSOR_FILES: Final = ("*processor_config.json", "processor_config.json")


def text_part(whole: Any, name: str) -> nn.Module:
    """The causal language model in ``whole``, of the same weights.

    Raises ``UnsupportedModelError`` where the decoder of ``whole`` is not that of transformers' causal language model.
    """
    from transformers import AutoModelForCausalLM

    decoder: Any = whole.get_decoder()
    head: Any = whole.get_output_embeddings()
    known = AutoModelForCausalLM._model_mapping  # noqa: SLF001  transformers has no public way to ask
    causal = known.get(type(decoder.config), None)
    if causal is not None and type(decoder) is causal:
        return decoder
    if causal is None or head is None:
        raise _refusal(whole, name, "its decoder is of another kind")
    with torch.device("meta"):
        # One configuration for both: what is switched in it (the kind of attention) counts for the layers as well.
        part = causal(decoder.config)
    if type(part.get_decoder()) is not type(decoder):
        raise _refusal(whole, name, "its decoder is of another kind")
    setattr(part, part.base_model_prefix, decoder)
    part.set_output_embeddings(head)
    own = {id(parameter) for parameter in whole.parameters()}
    if any(id(parameter) not in own for parameter in part.parameters()):
        raise _refusal(whole, name, "its language model has weights of its own")
    part.generation_config = whole.generation_config
    return part


def check_text_part(whole: nn.Module, part: nn.Module, name: str) -> None:
    """Raises ``UnsupportedModelError`` unless the part predicts of a text what the whole model predicts of it."""
    settings: Any = whole.config
    special = {value for value in _values(settings.to_dict()) if isinstance(value, int)}
    vocabulary = int(getattr(part.config, "vocab_size", 0)) or _TOKENS
    ordinary = [token for token in range(min(vocabulary, 100 * _TOKENS)) if token not in special]
    tokens = torch.tensor([ordinary[-_TOKENS:]])
    was_training = whole.training
    whole.eval()
    part.eval()
    try:
        with torch.no_grad():
            expected = whole(input_ids=tokens, use_cache=False).logits
            found = part(input_ids=tokens, use_cache=False).logits
    finally:
        whole.train(was_training)
        part.train(was_training)
    if not torch.allclose(expected.float(), found.float(), rtol=1e-3, atol=1e-4):
        raise _refusal(whole, name, "it reads a text in another way than its text part by itself")


def copy_processor(model_dir: Path, directory: Path) -> None:
    """Copies the settings of image and sound processors, which no training changes."""
    for pattern in PROCESSOR_FILES:
        for path in model_dir.glob(pattern):
            (directory / path.name).write_bytes(path.read_bytes())


def _values(settings: Any) -> list[Any]:
    if isinstance(settings, dict):
        return [one for key, value in settings.items() if "token" in str(key) for one in _values(value)] + [
            one for value in settings.values() if isinstance(value, dict) for one in _values(value)
        ]
    return list(settings) if isinstance(settings, (list, tuple)) else [settings]


def _refusal(whole: nn.Module, name: str, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{name} is a {type(whole).__name__} that cannot be trained on text alone: {reason}. Choose the text-generation model "
        "of this family."
    )
