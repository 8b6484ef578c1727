"""What a model says about itself, in files that are small beside its weights: configuration and tokenizer."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from metaflow_hf.config import TrainConfig
from metaflow_hf.errors import ConfigError, UnsupportedModelError
from metaflow_hf.store import ObjectStore
from metaflow_hf.store.manifests import Manifest
from metaflow_hf.store.materialize import materialize
from metaflow_hf.store.models import find_manifest
from metaflow_hf.store.node_cache import NodeCache

DESCRIPTION: Final = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py")
NO_DESCRIPTION: Final = ("*.index.json",)
ADAPTER_FILE: Final = "adapter_config.json"
# Learned positions end there; rotary ones were never trained beyond.
_POSITIONS: Final = ("max_position_embeddings", "n_positions")


def is_description(name: str) -> bool:
    """Whether a file of a model describes it, rather than being a part of its weights."""
    path = Path(name)
    return any(map(path.match, DESCRIPTION)) and not any(map(path.match, NO_DESCRIPTION))


def write_description(
    store: ObjectStore, reference: Mapping[str, Any], target: Path, *, cache: NodeCache
) -> Path:
    """Writes the files that describe a stored model or snapshot below ``target``, without its weights."""
    _, manifest = find_manifest(store, reference)
    described = [file for file in manifest.files if is_description(file.path)]
    return materialize(store, Manifest(files=tuple(described), about=manifest.about), target, cache=cache)


def read_config_json(model_dir: Path, name: str) -> dict[str, Any]:
    """The values of a model's config.json; ``name`` is what the user calls it. Raises ``UnsupportedModelError``."""
    try:
        values = json.loads((model_dir / "config.json").read_text("utf-8"))
    except FileNotFoundError as error:
        if (model_dir / ADAPTER_FILE).exists():
            raise UnsupportedModelError(
                f"{name} is an adapter of {adapted_model(model_dir)}, not a whole model: nothing can be trained on top of "
                "it. Train it with model.lora.save: merged, and go on from that."
            ) from error
        raise UnsupportedModelError(
            f"{name} has no config.json, so it is no model of transformers: choose one that has weights, a tokenizer and "
            "a config.json."
        ) from error
    except ValueError as error:
        raise UnsupportedModelError(f"the config.json of {name} is not readable as JSON: {error}.") from error
    if not isinstance(values, dict):
        raise UnsupportedModelError(f"the config.json of {name} holds no settings: {values!r:.80}.")
    return values


def adapted_model(model_dir: Path) -> str:
    """The model that the adapters in ``model_dir`` say they belong to."""
    return str(json.loads((model_dir / ADAPTER_FILE).read_text("utf-8")).get("base_model_name_or_path"))


def check_length(model_dir: Path, config: TrainConfig) -> None:
    """Raises ``ConfigError`` when sequences would be longer than the positions that the model knows, and
    ``UnsupportedModelError`` for a model that says nothing about itself.
    """
    values = read_config_json(model_dir, config.model.name) | config.model.architecture
    limits = [values[name] for name in _POSITIONS if isinstance(values.get(name), int)]
    if limits and config.data.sequence_length > limits[0]:
        raise ConfigError(
            f"data.sequence_length = {config.data.sequence_length:,} is more than the {limits[0]:,} positions of "
            f"{config.model.name}: lower it."
        )
