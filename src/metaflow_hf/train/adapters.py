"""Low-rank adapters (LoRA, arXiv 2106.09685) by peft: put on a model, folded into it, saved and loaded by themselves."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from metaflow_hf.config import LoraConfig
from metaflow_hf.errors import UnsupportedModelError
from metaflow_hf.train.description import ADAPTER_FILE
from metaflow_hf.train.optimizers import quiet_bitsandbytes


def add_adapters(model: nn.Module, lora: LoraConfig) -> nn.Module:
    """The model with fresh adapters, which alone are trained. Raises ``UnsupportedModelError`` when they do not fit."""
    peft = _peft("model.lora")
    settings = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    with _quietly():
        try:
            adapted: nn.Module = peft.get_peft_model(model, settings)
        except ValueError as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise UnsupportedModelError(
                f"model.lora does not fit this model: {reason}. Name its layers in model.lora.target_modules."
            ) from error
    return adapted


def merge_adapters(model: nn.Module) -> nn.Module:
    """The model with its adapters folded into the weights; a model without any is returned as it is."""
    merge = getattr(model, "merge_and_unload", None)
    return merge() if callable(merge) else model


def save_adapters(model: nn.Module, directory: Path, *, base_model: str, revision: str | None) -> None:
    """Writes the adapters alone, as peft loads them; they name the model that they belong to, and no path of this
    machine.
    """
    adapted: Any = model
    for settings in adapted.peft_config.values():
        settings.base_model_name_or_path, settings.revision = base_model, revision
    # peft would look the base model up on the hub, to see whether its embeddings changed.
    adapted.save_pretrained(directory, save_embedding_layers=False)


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds adapters rather than a model."""
    return (directory / ADAPTER_FILE).exists()


def load_adapters(model: nn.Module, directory: Path) -> nn.Module:
    """``model`` with the adapters in ``directory`` folded into its weights."""
    peft = _peft("an adapter")
    with _quietly():
        return merge_adapters(peft.PeftModel.from_pretrained(model, str(directory)))


def _peft(what: str) -> Any:
    try:
        import peft
    except ImportError as error:
        raise UnsupportedModelError(
            f"{what} needs the package peft: pip install 'metaflow-hf[peft]'."
        ) from error
    return peft


@contextmanager
def _quietly() -> Iterator[None]:
    with warnings.catch_warnings(), quiet_bitsandbytes():
        # peft asks transformers for an attribute by its old name.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        yield
