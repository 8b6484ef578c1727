"""What a model's config.json says: the configuration of the causal language model that is trained, or why none is.

A multimodal model (``…ForConditionalGeneration``) is trained on text by its text part, where transformers has a causal
language model for that part. Nothing here reads weights.
"""

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from metaflow_hf.config import ModelConfig
from metaflow_hf.errors import ConfigError, UnsupportedModelError
from metaflow_hf.hub.errors import ImpossibleValue

CUSTOM_CODE: Final = (
    "Read it at one commit, then set model.trust_remote_code: true and model.revision to this commit's hash; or choose a model "
    "that transformers knows."
)


@dataclass(frozen=True, slots=True)
class Architecture:
    """``language`` configures the causal language model; ``whole`` the multimodal model that it is a part of, if any."""

    language: Any
    whole: Any = None

    @property
    def model_class(self) -> Any:
        """The class of transformers that loads the checkpoint; ``None`` where the model brings its own."""
        from transformers import AutoModelForCausalLM

        if self.whole is not None:
            return multimodal_classes()[type(self.whole)]
        known = AutoModelForCausalLM._model_mapping  # noqa: SLF001  transformers has no public way to ask
        return known.get(type(self.language), None)


def read_architecture(model_dir: Path, config: ModelConfig) -> Any:
    """The configuration of the language model in ``model_dir``; see ``find_architecture``."""
    return find_architecture(model_dir, config).language


def find_architecture(model_dir: Path, config: ModelConfig) -> Architecture:
    """The configuration in transformers, with the values of ``model.architecture``.

    Raises ``UnsupportedModelError`` for a model that is no causal language model and has none as its text part, and for one
    whose own code is not trusted; ``ConfigError`` for values that it has not.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    name = called(model_dir, config)
    _check_custom_code(model_dir, config, name)
    try:
        architecture = AutoConfig.from_pretrained(model_dir, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError, ImpossibleValue) as error:
        raise UnsupportedModelError(
            f"{name} is no model that transformers knows ({first_line(error)})."
        ) from error
    architecture = _changed(architecture, config)
    known = AutoModelForCausalLM._model_mapping  # noqa: SLF001  transformers has no public way to ask
    declared = getattr(architecture, "architectures", None) or []
    remote = "AutoModelForCausalLM" in (getattr(architecture, "auto_map", None) or {})
    if remote and config.trust_remote_code:
        return Architecture(architecture)
    if _is_multimodal(architecture, declared):
        return _text_part(architecture, config, name)
    if remote and type(architecture) not in known:
        raise UnsupportedModelError(f"{name} is loaded by Python code of its own. {CUSTOM_CODE}")
    if (
        type(architecture) not in known
        or architecture.is_encoder_decoder
        or _looks_ahead(architecture)
        or (declared and not any(one.endswith(("CausalLM", "LMHeadModel", "Model")) for one in declared))
    ):
        kind = ", ".join(declared) or type(architecture).__name__
        raise UnsupportedModelError(
            f"{name} is a {kind}: only causal language models (GPT-like decoders) can be trained here. "
            "Choose a text-generation model."
        )
    return Architecture(architecture)


def called(model_dir: Path, config: ModelConfig) -> str:
    """What the user calls the model, else the name of its directory."""
    return config.name or model_dir.name


def multimodal_classes() -> Any:
    """Configuration class -> class of models that read more than text and write text."""
    from transformers import AutoModelForMultimodalLM

    return AutoModelForMultimodalLM._model_mapping  # noqa: SLF001  transformers has no public way to ask


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _check_custom_code(model_dir: Path, config: ModelConfig, name: str) -> None:
    """Raises ``UnsupportedModelError`` for a configuration that only code of the model's own can read."""
    from transformers import CONFIG_MAPPING

    try:
        values = json.loads((model_dir / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        # AutoConfig finds the words for it.
        return
    custom = values.get("auto_map") if isinstance(values, dict) else None
    if config.trust_remote_code or not isinstance(custom, dict) or "AutoConfig" not in custom:
        return
    if values.get("model_type") not in CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"{name} needs Python code of its own ({custom['AutoConfig']}, auto_map in its config.json). {CUSTOM_CODE}"
        )


_ahead: Final[dict[type, bool]] = {}


def _looks_ahead(architecture: Any) -> bool:
    """Whether a model sees the tokens after the one that it predicts from.

    Encoders such as BERT have a causal head too, but without ``is_decoder`` they look ahead. Some decoders (GPT-NeoX) say
    ``is_decoder: false`` as well, so a small model of the kind is tried.
    """
    if getattr(architecture, "is_decoder", True) is not False:
        return False
    kind = type(architecture)
    if kind not in _ahead:
        _ahead[kind] = not _is_causal(architecture)
    return _ahead[kind]


def _is_causal(architecture: Any) -> bool:
    from metaflow_hf.rollout.miniature import small_model

    tokens = torch.arange(1, 11, device="cpu")[None]
    changed = tokens.clone()
    changed[0, -1] = 20
    try:
        # The caller may be building models without values.
        with torch.device("cpu"), torch.no_grad():
            small = small_model(architecture)
            first, second = (small(input_ids=ids).logits[:, :-1] for ids in (tokens, changed))
    except (ValueError, RuntimeError, TypeError):
        return False
    return torch.allclose(first, second, atol=1e-5)


def _is_multimodal(architecture: Any, declared: list[str]) -> bool:
    if architecture.is_encoder_decoder or type(architecture) not in multimodal_classes():
        return False
    if any(one.endswith(("CausalLM", "LMHeadModel")) for one in declared):
        return False
    return architecture.get_text_config(decoder=True) is not architecture


def _text_part(architecture: Any, config: ModelConfig, name: str) -> Architecture:
    from transformers import AutoModelForCausalLM

    kind = multimodal_classes()[type(architecture)].__name__
    text = architecture.get_text_config(decoder=True)
    if (
        type(text) not in AutoModelForCausalLM._model_mapping  # noqa: SLF001
        or text.is_encoder_decoder
        or _looks_ahead(text)
    ):
        raise UnsupportedModelError(
            f"{name} is a {kind}, and transformers has no causal language model for its text part "
            f"({type(text).__name__}): it cannot be trained on text alone. Choose the text-generation model of this family."
        )
    if config.initialise == "random":
        raise ConfigError(
            f"model.initialise: random makes a language model, and {name} is a {kind}: name a text-generation model in "
            "model.repo_id, or train this one with initialise: pretrained."
        )
    if config.lora is not None and config.lora.save == "adapter":
        raise ConfigError(
            f"model.lora.save: adapter saves adapters of a language model, which {name}, a {kind}, does not take: set "
            "model.lora.save: merged."
        )
    text.tie_word_embeddings = architecture.tie_word_embeddings
    return Architecture(text, whole=architecture)


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
        reason = " ".join(str(error).split("\n", 1)[-1].split()).partition(": ")[2] or first_line(error)
        raise ConfigError(f"model.architecture: {reason.rstrip('.')}.") from error
