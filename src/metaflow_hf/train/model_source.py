"""Where a model comes from (the hub, the datastore, a local directory), and what it says about itself before it is loaded."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Final

from metaflow_hf.config import ModelConfig
from metaflow_hf.config_sections import existing_directory
from metaflow_hf.hub.repository_files import RepositoryFiles
from metaflow_hf.hub.request import SnapshotRequest
from metaflow_hf.hub.snapshots import Snapshots
from metaflow_hf.references import ModelRef
from metaflow_hf.store import ObjectStore, configured_store, open_store
from metaflow_hf.store.models import MAX_LABEL_BYTES, find_manifest, save_files
from metaflow_hf.store.node_cache import NodeCache
from metaflow_hf.store.objects import quote_part
from metaflow_hf.train.description import (
    DESCRIPTION,
    NO_DESCRIPTION,
    is_description,
    read_config_json,
    write_description,
)
from metaflow_hf.train.weight_files import DirectoryFiles, ModelFiles, StoredFiles, weight_files

# What transformers reads beside weights. A directory may hold a whole training besides: logs, optimizers, checkpoints.
_CONFIGURATION: Final = (
    "*config.json",
    "*.jinja",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "added_tokens.json",
    "bpe.codes",
    "chat_template*",
    "dict.txt",
    "merges.txt",
    "special_tokens_map.json",
    "tekken.json",
    "tokenizer*",
    "vocab*",
)
_CHAT_TEMPLATES: Final = "additional_chat_templates"


@dataclass(frozen=True, slots=True, kw_only=True)
class DescribedModel:
    """A model without its weights: ``directory`` holds configuration and tokenizer, ``files`` reads what else there is.

    ``reference`` is the model's, or as much of one as is known; ``num_bytes`` the size of all its files.
    """

    directory: Path
    reference: Mapping[str, Any]
    num_bytes: int
    files: ModelFiles


def describe_model(
    config: ModelConfig, root: Path, find_model: Callable[[str], Mapping[str, Any]]
) -> DescribedModel:
    """Looks at the model that ``config`` names, and writes its description below ``root``; nothing is stored.

    ``find_model`` finds the reference of ``model.reference``. Raises ``UnsupportedModelError``, ``ConfigError`` and the
    errors of hub and store.
    """
    target, cache = root / "model", NodeCache(root / "cache")
    if config.directory is not None:
        return _describe_directory(config, config.directory, target)
    if config.reference:
        reference = find_model(config.reference)
        store = configured_store()
        directory = write_description(store, reference, target, cache=cache)
        files = StoredFiles(store, find_manifest(store, reference)[1])
        return DescribedModel(
            directory=directory, reference=reference, num_bytes=reference["size"], files=files
        )
    return _describe_repository(config, Snapshots(open_store(root / "hub"), cache), target)


def directory_files(config: ModelConfig, directory: Path) -> dict[str, Path]:
    """Name -> path of the files in ``directory`` that transformers needs: configuration, tokenizer and weights.

    Raises ``UnsupportedModelError`` for a directory that holds no whole model.
    """
    # Says what is missing, or that it is an adapter.
    read_config_json(directory, config.name)
    files = {path.name: path for path in sorted(directory.iterdir()) if path.is_file()}
    wanted = {name for name in files if any(fnmatch(name, pattern) for pattern in _CONFIGURATION)}
    if config.trust_remote_code:
        wanted |= {name for name in files if name.endswith(".py")}
    if config.initialise == "pretrained":
        weights = weight_files(DirectoryFiles(directory), config.name, allow_pickle=config.allow_pickle)
        wanted |= {*weights, *(f"{name}.index.json" for name in ("model.safetensors", "pytorch_model.bin"))}
    templates = sorted((directory / _CHAT_TEMPLATES).glob("*.jinja"))
    return {
        **{name: path for name, path in files.items() if name in wanted},
        **{f"{_CHAT_TEMPLATES}/{path.name}": path for path in templates},
    }


def save_directory_model(store: ObjectStore, config: ModelConfig, pathspec: str) -> ModelRef:
    """Stores the local directory that ``config`` names as a model of the task ``pathspec``, and returns its reference.

    Only what transformers needs is stored, and no content twice. The reference names the directory, not its path.
    """
    directory = existing_directory(config.directory, config.repo_id)
    flow, run, step, task = pathspec.split("/")
    label = config.name
    return save_files(
        store,
        directory_files(config, directory),
        flow=flow,
        run=run,
        step=step,
        task=task,
        label=label if len(quote_part(label)) <= MAX_LABEL_BYTES else "model",
    )


def _describe_directory(config: ModelConfig, directory: Path, target: Path) -> DescribedModel:
    files = directory_files(config, existing_directory(directory, config.repo_id))
    target.mkdir(parents=True)
    for name, path in files.items():
        if is_description(name):
            (target / name).parent.mkdir(exist_ok=True)
            (target / name).write_bytes(path.read_bytes())
    size = sum(path.stat().st_size for path in files.values())
    return DescribedModel(directory=target, reference={}, num_bytes=size, files=DirectoryFiles(directory))


def _describe_repository(config: ModelConfig, snapshots: Snapshots, target: Path) -> DescribedModel:
    repo_id, revision = str(config.repo_id), config.revision
    request = SnapshotRequest.of(repo_id, revision=revision)
    files = snapshots.plan(request)
    if not any(is_description(file.filename) for file in files):
        # Says what is missing; a selection of nothing would say less.
        read_config_json(target, repo_id)
    described = snapshots.ensure(
        SnapshotRequest.of(
            repo_id,
            revision=revision,
            allow_patterns=list(DESCRIPTION),
            ignore_patterns=list(NO_DESCRIPTION),
        )
    )
    sizes = {file.filename: file.file_size or 0 for file in files}
    return DescribedModel(
        directory=snapshots.load(described, target),
        reference=described.to_json(),
        num_bytes=sum(sizes.values()),
        files=RepositoryFiles(request, described.commit_hash, sizes),
    )
