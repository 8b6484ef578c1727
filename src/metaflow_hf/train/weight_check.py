"""Whether a checkpoint fits its config.json, found from the names and shapes of its tensors before values are read.

transformers decides: it loads tensors without values into a model without values, so renamed, tied, fused and ignored
tensors count as they do in training. What it would only warn about (weights that it would make up) is an error here.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Final

import torch
from torch import nn

from metaflow_hf.errors import UnsupportedModelError

logger = logging.getLogger("metaflow_hf.train")

# Buffers that old checkpoints hold, and that a model computes by itself.
_COMPUTED: Final = re.compile(r"(.*\.)?(masked_bias|attn\.bias|attention\.bias|inv_freq|position_ids)")
_IN_A_LAYER: Final = re.compile(r"\.\d+\.")


def check_shapes(
    shapes: Mapping[str, tuple[int, ...]], model_class: Any, architecture: Any, name: str
) -> None:
    """Raises ``UnsupportedModelError`` where tensors of these names and ``shapes`` do not make a ``model_class``.

    Quantised checkpoints pass unchecked: their tensors are no weights before they are loaded.
    """
    if is_quantised(architecture):
        return
    if find_spec("accelerate") is None:
        # transformers loads onto the meta device with this package alone.
        logger.warning(
            "the weights of %s are compared with its config.json only when they are loaded: install the package accelerate.",
            name,
        )
        return
    tensors = {tensor: torch.empty(shape, device="meta") for tensor, shape in shapes.items()}
    try:
        with without_report():
            _, report = model_class.from_pretrained(
                None,
                config=architecture,
                state_dict=tensors,
                device_map="meta",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except (RuntimeError, NotImplementedError, ValueError, TypeError, KeyError, AttributeError) as error:
        # Models that compute while they are built cannot be built without values; loading them tells.
        logger.info("the tensors of %s are not compared with its config.json: %s", name, error)
        return
    check_report(report, name)


def is_quantised(architecture: Any) -> bool:
    """Whether the checkpoint of this configuration holds something else than weights: codes and scales."""
    return getattr(architecture, "quantization_config", None) is not None


def check_report(report: Mapping[str, Any], name: str, *, quantised: bool = False) -> None:
    """Raises ``UnsupportedModelError`` for what transformers reports of a load: shapes that differ, missing tensors, and
    tensors of layers that the model does not have (those of a ``quantised`` checkpoint are none of its weights).
    """
    if mismatched := sorted(report.get("mismatched_keys") or (), key=lambda one: one[0]):
        tensor, found, expected = mismatched[0]
        raise UnsupportedModelError(
            f"{len(mismatched)} of the tensors of {name} have other shapes than its config.json says ({tensor} is "
            f"{list(found)} in the checkpoint and {list(expected)} by config.json): use the config.json that was saved with "
            "these weights."
        )
    if missing := sorted(report["missing_keys"]):
        # transformers would make them up, differently in each process.
        raise UnsupportedModelError(
            f"{name} lacks {len(missing)} of the model's weights ({_some(missing)}): take a checkpoint with a language-model "
            "head and all layers, or set model.initialise: random."
        )
    unexpected = sorted(
        tensor for tensor in report.get("unexpected_keys") or () if not _COMPUTED.fullmatch(tensor)
    )
    if quantised:
        return
    if extra := [tensor for tensor in unexpected if _IN_A_LAYER.search(tensor)]:
        raise UnsupportedModelError(
            f"{name} holds {len(extra)} tensors that the model of its config.json has no place for ({_some(extra)}): they would "
            "be lost. Use the config.json that was saved with these weights."
        )
    if unexpected:
        logger.warning("%s: tensors outside of the language model are not used: %s", name, _some(unexpected))


def check_finite(model: nn.Module, name: str) -> None:
    """Raises ``UnsupportedModelError`` for a model with weights that are NaN or infinite."""
    damaged = [
        tensor
        for tensor, weight in model.named_parameters()
        if weight.is_floating_point() and not weight.detach().isfinite().all()
    ]
    if damaged:
        raise UnsupportedModelError(
            f"{len(damaged)} of the tensors of {name} hold NaN or infinite values ({_some(damaged)}): the checkpoint is damaged. "
            "Take another revision, or an earlier checkpoint."
        )


@contextmanager
def without_report() -> Iterator[None]:
    """Keeps the table of transformers about missing and unexpected tensors out of the log: an error says it."""
    its = logging.getLogger("transformers")
    before = its.level
    its.setLevel(logging.ERROR)
    try:
        yield
    finally:
        its.setLevel(before)


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
