"""What a flow's parameters put in the place of values of its configuration."""

from collections.abc import Mapping
from typing import Any

from metaflow_hf.config import ModelConfig, TrainConfig
from metaflow_hf.config_sections import existing_directory
from metaflow_hf.environment import runs_locally
from metaflow_hf.errors import ConfigError, SelectionError
from metaflow_hf.hub.names import check_repo_id
from metaflow_hf.train.devices import check_enough_gpus, check_parallel, visible_gpus


def configured(
    values: Mapping[str, Any],
    *,
    repo_id: str | None = None,
    revision: str | None = None,
    reference: str | None = None,
    dataset: str | None = None,
    num_gpus: int | None = None,
    max_tokens: int | None = None,
) -> tuple[TrainConfig, str | None, str | None]:
    """The configuration with the parameters that are given, and the hubs that model and data come from.

    Raises ``ConfigError`` that lists all mistakes, for what contradicts itself or is missing, and for more branches than
    there are GPUs for.
    """
    config = TrainConfig.parse(_plain(values))
    if repo_id and reference:
        raise ConfigError("--repo_id and --reference both say where to begin: pass one of them.")
    here = config.hub == "embedded"
    model_hub = None if here and repo_id and repo_id != config.model.repo_id else config.hub
    data_hub = None if here and dataset and dataset != config.data.dataset else config.hub
    given: dict[str, dict[str, Any]] = {}
    if repo_id:
        # A revision of the configured model means nothing in another repository.
        given["model"] = {"repo_id": repo_id, "revision": revision or "main", "reference": None}
    elif reference:
        given["model"] = {"reference": reference, "repo_id": None, "revision": "main"}
    elif revision:
        given["model"] = {"revision": revision}
    if dataset:
        given["data"] = {"dataset": dataset}
        if dataset != config.data.dataset:
            given["data"]["evaluation_dataset"] = None
        if config.data.datasets:
            # The parameter replaces the whole mixture; these described the rows of its evaluation dataset.
            given["data"] |= {"datasets": [], "format": "auto", "columns": {}, "text_column": None}
    if max_tokens is not None:
        given["rounds"] = {"max_tokens": max_tokens}
    if num_gpus is not None:
        given.setdefault("rounds", {})["workers"] = _branches(num_gpus, config.rounds.gpus_per_worker)
    if config.data.chat_template is not None:
        given.setdefault("data", {})["chat_template"] = _template_text(config.data.chat_template)
    config = config.replace(**given)
    for path, value, flag in (
        ("model.repo_id", config.model.name, "--repo_id"),
        ("data.dataset", config.data.title, "--dataset"),
    ):
        if not value:
            raise ConfigError(f"{path} is required: set it in the configuration or pass {flag}.")
    _check_model(config.model)
    check_parallel(config)
    rounds = config.rounds
    check_enough_gpus(rounds.workers, rounds.gpus_per_worker, may_share=rounds.share_gpus)
    return config, model_hub, data_hub


def _check_model(model: ModelConfig) -> None:
    """Raises ``ConfigError`` for a ``repo_id`` that is neither a directory nor the id of a repository."""
    if model.repo_id is None:
        return
    if model.directory is not None:
        existing_directory(model.directory, model.repo_id)
        return
    try:
        check_repo_id(model.repo_id)
    except SelectionError as error:
        raise ConfigError(
            f"model.repo_id: {model.repo_id!r} is neither the id of a repository (owner/name) nor the path of a directory: "
            "write ./name for a local directory."
        ) from error


def _template_text(template: str) -> str:
    """The text of a template that lies on this machine, so that other machines have it too; a name of one that the
    tokenizer brings along stays a name.
    """
    from metaflow_hf.data.chat import read_chat_template

    try:
        return read_chat_template(template)
    except ConfigError:
        if "/" in template or "\\" in template or template.endswith(".jinja"):
            raise
        return template


def _branches(num_gpus: int, per_branch: int) -> int:
    if num_gpus < 0:
        raise ConfigError(
            f"--num_gpus {num_gpus}: give a number of branches, or 0 for all GPUs of this machine."
        )
    if num_gpus:
        return num_gpus
    if not runs_locally():
        raise ConfigError(
            "--num_gpus 0 means all GPUs of the machine where the run starts, which has none here: give the number of "
            "branches."
        )
    return max(len(visible_gpus()) // per_branch, 1)


def _plain(value: Any) -> Any:
    """Metaflow's configuration values as plain dicts and lists."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
