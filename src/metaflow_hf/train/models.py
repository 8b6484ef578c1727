"""Models and tokenizers from a directory: causal language models only, safetensors first.

Trained parameters are held in fp32, whatever the dtype of the checkpoint: ``model.dtype`` decides in which
dtype the layers compute and the result is exported.
"""

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from metaflow_hf.config import ModelConfig, TrainConfig
from metaflow_hf.errors import UnsupportedModelError
from metaflow_hf.train.adapters import add_adapters, is_adapter, load_adapters
from metaflow_hf.train.architecture import (
    CUSTOM_CODE,
    Architecture,
    called,
    find_architecture,
    first_line,
    read_architecture,
)
from metaflow_hf.train.description import adapted_model
from metaflow_hf.train.sharding import fill
from metaflow_hf.train.text_part import text_part
from metaflow_hf.train.weight_check import check_report, is_quantised, without_report
from metaflow_hf.train.weight_files import DirectoryFiles, is_safetensors, tensor_shapes, weight_files

logger = logging.getLogger("metaflow_hf.train")

_one_at_a_time = threading.Lock()
_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_tokenizer(model_dir: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer in ``model_dir``. Raises ``UnsupportedModelError`` when there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model_dir, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        if "trust_remote_code" in str(error):
            raise UnsupportedModelError(
                f"the tokenizer of {model_dir.name} needs Python code of its own (auto_map in its tokenizer_config.json). "
                f"{CUSTOM_CODE}"
            ) from error
        raise UnsupportedModelError(
            f"{model_dir.name} has no usable tokenizer ({first_line(error)}): take a model that comes with one."
        ) from error


class LoadedModel(NamedTuple):
    """The causal language model, and the multimodal model that it is a part of: the same object for any other."""

    language: nn.Module
    whole: nn.Module


def load_model(
    model_dir: Path,
    config: ModelConfig,
    *,
    initialise: bool | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    base_dir: Path | None = None,
) -> nn.Module:
    """The causal language model in ``model_dir`` on the CPU, in ``dtype``.

    ``initialise`` (default: what the configuration says) makes fresh weights from ``seed`` instead of reading
    them. Adapters are folded into the model in ``base_dir``. Raises ``UnsupportedModelError`` for another kind of model,
    for pickled weights without ``model.allow_pickle``, and for adapters without ``base_dir``.
    """
    if not is_adapter(model_dir):
        return load_parts(model_dir, config, initialise=initialise, seed=seed, dtype=dtype).language
    if base_dir is None:
        raise UnsupportedModelError(
            f"{model_dir.name} is an adapter of {adapted_model(model_dir)}, not a model: load it with peft "
            "on top of that, or train with model.lora.save: merged."
        )
    base = load_parts(base_dir, config, initialise=False, seed=seed, dtype=dtype).language
    with loading():
        return load_adapters(base, model_dir)


def load_parts(
    model_dir: Path,
    config: ModelConfig,
    *,
    initialise: bool | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> LoadedModel:
    """As ``load_model``, with the multimodal model around the language model, where there is one."""
    found = find_architecture(model_dir, config)
    fresh = config.initialise == "random" if initialise is None else initialise
    with loading():
        if fresh:
            model = _fresh(found, config, seed=seed, dtype=dtype)
            return LoadedModel(model, model)
        whole = _pretrained(model_dir, found, config, dtype=dtype)
        if found.whole is None:
            return LoadedModel(whole, whole)
        return LoadedModel(text_part(whole, called(model_dir, config)), whole)


def _fresh(found: Architecture, config: ModelConfig, *, seed: int, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = AutoModelForCausalLM.from_config(
            found.language, trust_remote_code=config.trust_remote_code, dtype=dtype
        )
    return model


def _pretrained(
    model_dir: Path, found: Architecture, config: ModelConfig, *, dtype: torch.dtype
) -> nn.Module:
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

    name = called(model_dir, config)
    directory = DirectoryFiles(model_dir)
    files = weight_files(directory, name, allow_pickle=config.allow_pickle)
    if is_safetensors(files):
        # Says which file is damaged, and why.
        tensor_shapes(directory, files, name)
    loader = AutoModelForCausalLM if found.whole is None else AutoModelForMultimodalLM
    loaded: nn.Module
    try:
        with without_report():
            loaded, report = loader.from_pretrained(
                model_dir,
                config=found.language if found.whole is None else found.whole,
                trust_remote_code=config.trust_remote_code,
                use_safetensors=is_safetensors(files),
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except ImportError as error:
        raise UnsupportedModelError(
            f"{name} cannot be loaded without a package that is not installed here ({first_line(error)}): install it, or "
            "choose a checkpoint that is not quantised."
        ) from error
    check_report(report, name, quantised=is_quantised(found.whole or found.language))
    return loaded


def prepare(model: nn.Module, config: ModelConfig, *, seed: int = 0) -> nn.Module:
    """The model as it is trained: with adapters, whose first values come from ``seed``, if so configured."""
    if config.lora is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return add_adapters(model, config.lora)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    quantised = [name for name, parameter in model.named_parameters() if not parameter.is_floating_point()]
    if quantised:
        raise UnsupportedModelError(
            f"{config.name or 'the model'} is quantised: {len(quantised)} of its tensors ({quantised[0]}, …) hold integers, "
            "which cannot be trained. Choose the checkpoint that is not quantised, or set model.lora."
        )
    return model


def load_trainable(model_dir: Path, config: TrainConfig, device: torch.device) -> nn.Module:
    """The model as a worker trains it: in fp32 what is trained, the rest in the dtype of the computation."""
    dtype = torch.float32 if config.model.lora is None else compute_dtype(config.model, device)
    model = load_model(model_dir, config.model, seed=config.data.seed, dtype=dtype)
    return prepare(model, config.model, seed=config.data.seed)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What training changes, by name; tied parameters once."""
    return {name: p for name, p in sorted(model.named_parameters()) if p.requires_grad}


def load_weights(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor] | Any) -> None:
    """Copies named tensors into parameters of the same names."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            fill(parameter, tensors[name])


def known_positions(model: nn.Module) -> int | None:
    """The positions that the model knows, if its configuration says."""
    return _positions_of(getattr(model, "config", None))


def known_tokens(model: nn.Module) -> int | None:
    """The number of tokens that the model has embeddings for, if it says."""
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    weight = getattr(embeddings, "weight", None)
    return int(weight.shape[0]) if isinstance(weight, Tensor) else None


def declared_positions(model_dir: Path, config: ModelConfig) -> int | None:
    """``known_positions`` of the model in ``model_dir``, which is not loaded for the question."""
    return _positions_of(read_architecture(model_dir, config))


def _positions_of(architecture: Any) -> int | None:
    known = getattr(architecture, "max_position_embeddings", None)
    return known if isinstance(known, int) else None


def compute_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """The dtype in which the layers compute: ``auto`` is bf16 on a GPU that has it, else fp32."""
    if config.dtype != "auto":
        return _DTYPES[config.dtype]
    # GPUs before Ampere have bf16 in software only, slower than fp32.
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


def export_dtype(model_dir: Path, config: ModelConfig) -> torch.dtype:
    """The dtype of the exported weights: ``auto`` is that of the checkpoint in ``model_dir``, fp32 for fresh weights.

    A loaded model does not tell: transformers writes into its configuration what it was loaded in.
    """
    if config.dtype != "auto":
        return _DTYPES[config.dtype]
    if config.initialise == "random":
        return torch.float32
    found = find_architecture(model_dir, config)
    declared: Any = getattr(found.whole or found.language, "dtype", None)
    return next((dtype for dtype in _DTYPES.values() if dtype == declared), torch.float32)


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model itself with its weights in ``dtype``; complex buffers, which are computed, stay as they are."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return model


def save_model(model: nn.Module, directory: Path) -> None:
    """Writes a model as a directory that transformers loads."""
    exported: Any = model
    with loading():
        exported.save_pretrained(directory)


@contextmanager
def loading() -> Iterator[None]:
    """One model at a time, without a bar: transformers switches global state while it builds one."""
    from transformers.utils import logging as transformers_logging

    with _one_at_a_time:
        shown = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        try:
            yield
        finally:
            if shown:
                transformers_logging.enable_progress_bar()
