"""Models and tokenizers from a directory: causal language models only, safetensors first.

Trained parameters are held in fp32, whatever the dtype of the checkpoint: ``model.dtype`` decides in which
dtype the layers compute and the result is exported.
"""

import difflib
import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from metaflow_hf.config import ModelConfig, TrainConfig
from metaflow_hf.errors import ConfigError, UnsupportedModelError
from metaflow_hf.hub.errors import ImpossibleValue
from metaflow_hf.train.adapters import add_adapters, is_adapter, load_adapters
from metaflow_hf.train.description import adapted_model
from metaflow_hf.train.sharding import fill

logger = logging.getLogger("metaflow_hf.train")

_one_at_a_time = threading.Lock()
_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PICKLED: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def load_tokenizer(model_dir: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer in ``model_dir``. Raises ``UnsupportedModelError`` when there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model_dir, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UnsupportedModelError(
            f"{model_dir.name} has no usable tokenizer ({_first_line(error)}): take a model that comes with one."
        ) from error


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
    with _loading():
        if not is_adapter(model_dir):
            return _load_model(model_dir, config, initialise=initialise, seed=seed, dtype=dtype)
        if base_dir is None:
            raise UnsupportedModelError(
                f"{model_dir.name} is an adapter of {adapted_model(model_dir)}, not a model: load it with peft "
                "on top of that, or train with model.lora.save: merged."
            )
        base = _load_model(base_dir, config, initialise=False, seed=seed, dtype=dtype)
        return load_adapters(base, model_dir)


def _load_model(
    model_dir: Path, config: ModelConfig, *, initialise: bool | None, seed: int, dtype: torch.dtype
) -> nn.Module:
    from transformers import AutoModelForCausalLM

    architecture = read_architecture(model_dir, config)
    fresh = config.initialise == "random" if initialise is None else initialise
    if fresh:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: nn.Module = AutoModelForCausalLM.from_config(
                architecture, trust_remote_code=config.trust_remote_code, dtype=dtype
            )
        return model
    loaded: nn.Module
    loaded, report = AutoModelForCausalLM.from_pretrained(
        model_dir,
        config=architecture,
        trust_remote_code=config.trust_remote_code,
        use_safetensors=_has_safetensors(model_dir, config),
        dtype=dtype,
        output_loading_info=True,
    )
    missing = sorted(report["missing_keys"])
    if missing:
        # transformers would make them up, differently in each process.
        raise UnsupportedModelError(
            f"{model_dir.name} lacks {len(missing)} of the model's weights ({', '.join(missing[:3])}): take a checkpoint "
            "with a language-model head and all layers, or set model.initialise: random."
        )
    return loaded


def prepare(model: nn.Module, config: ModelConfig, *, seed: int = 0) -> nn.Module:
    """The model as it is trained: with adapters, whose first values come from ``seed``, if so configured."""
    if config.lora is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return add_adapters(model, config.lora)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
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
    declared: Any = getattr(read_architecture(model_dir, config), "dtype", None)
    return next((dtype for dtype in _DTYPES.values() if dtype == declared), torch.float32)


def save_model(model: nn.Module, directory: Path) -> None:
    """Writes a model as a directory that transformers loads."""
    exported: Any = model
    with _loading():
        exported.save_pretrained(directory)


def read_architecture(model_dir: Path, config: ModelConfig) -> Any:
    """The model's configuration in transformers, with the values of ``model.architecture``.

    Raises ``UnsupportedModelError`` for one that is no causal language model, ``ConfigError`` for values that it has not.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        architecture = AutoConfig.from_pretrained(model_dir, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError, ImpossibleValue) as error:
        raise UnsupportedModelError(
            f"{model_dir.name} is no model that transformers knows ({_first_line(error)})."
        ) from error
    architecture = _changed(architecture, config)
    known = AutoModelForCausalLM._model_mapping  # noqa: SLF001  transformers has no public way to ask
    declared = getattr(architecture, "architectures", None) or []
    remote = "AutoModelForCausalLM" in (getattr(architecture, "auto_map", None) or {})
    if remote and config.trust_remote_code:
        return architecture
    if (
        type(architecture) not in known
        or architecture.is_encoder_decoder
        # Encoders such as BERT have a causal head too, but without is_decoder they look ahead.
        or getattr(architecture, "is_decoder", True) is False
        or (declared and not any(name.endswith(("CausalLM", "LMHeadModel", "Model")) for name in declared))
    ):
        kind = ", ".join(declared) or type(architecture).__name__
        raise UnsupportedModelError(
            f"{model_dir.name} is a {kind}: only causal language models (GPT-like decoders) can be trained here. "
            "Choose a text-generation model."
        )
    return architecture


def _changed(architecture: Any, config: ModelConfig) -> Any:
    """The configured values in place of those that the model came with; what follows from them is made anew."""
    if not config.architecture:
        return architecture
    values = architecture.to_dict()
    for name in config.architecture:
        if name not in values:
            known = [key for key in values if not key.startswith("_")]
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(sorted(known))}."
            raise ConfigError(
                f"model.architecture.{name}: a {type(architecture).__name__} has no such value; {hint}"
            )
    if "num_hidden_layers" in config.architecture:
        values.pop("layer_types", None)
    if {"hidden_size", "num_attention_heads"} & config.architecture.keys():
        values.pop("head_dim", None)
    try:
        return type(architecture).from_dict({**values, **config.architecture})
    except ImpossibleValue as error:
        # The first line names the check, the others say what it found.
        reason = " ".join(str(error).split("\n", 1)[-1].split()).partition(": ")[2] or _first_line(error)
        raise ConfigError(f"model.architecture: {reason.rstrip('.')}.") from error


def _has_safetensors(model_dir: Path, config: ModelConfig) -> bool:
    if any(model_dir.glob("*.safetensors")):
        return True
    pickled = sorted(path.name for pattern in _PICKLED for path in model_dir.glob(pattern))
    if not pickled:
        raise UnsupportedModelError(
            f"{model_dir.name} holds no weights: expected *.safetensors. Load a snapshot with weights, or set "
            "model.initialise: random."
        )
    if not config.allow_pickle:
        raise UnsupportedModelError(
            f"{model_dir.name} has its weights only as pickle ({', '.join(pickled[:3])}), which can run any code when "
            "it is loaded: choose a revision with safetensors, or set model.allow_pickle: true if you trust it."
        )
    return False


@contextmanager
def _loading() -> Iterator[None]:
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


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
