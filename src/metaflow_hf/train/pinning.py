"""Branches and tags move; a lineage stays with the commits that it was started from."""

import re
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from metaflow_hf.config import TrainConfig
from metaflow_hf.train.records import Spec

_COMMIT: Final = re.compile(r"[0-9a-f]{40}")


def sources_of(
    config: TrainConfig,
    *,
    base_model: Mapping[str, Any],
    dataset_commit: str | None,
    evaluation_commit: str | None = None,
) -> dict[str, str]:
    """What a specification keeps of where model and data came from; no part of its digest.

    ``base_model`` is the reference of the model that training begins with; the commits are those of the datasets.
    """
    facts = {
        "model": config.model.name,
        "model_commit": base_model.get("commit_hash"),
        "model_key": base_model.get("key") if config.model.reference else None,
        "dataset": _unpinned(config.data.title),
        "dataset_commit": dataset_commit,
        "evaluation_dataset": evaluation_commit and _unpinned(str(config.data.evaluation_dataset)),
        "evaluation_dataset_commit": evaluation_commit,
    }
    return {name: value for name, value in facts.items() if value}


def pinned(config: TrainConfig, spec: Spec) -> TrainConfig:
    """``config`` with the lineage's commits in place of branches and tags; other repositories and commits stay as they are."""
    known, given = spec.sources, dict[str, dict[str, Any]]()
    if (
        "model_commit" in known
        and known.get("model") == config.model.repo_id
        and not _COMMIT.fullmatch(config.model.revision)
    ):
        given["model"] = {"revision": known["model_commit"]}
    if "model_key" in known and config.model.reference and known.get("model") == config.model.reference:
        given["model"] = {"reference": known["model_key"]}
    data: dict[str, Any] = {}
    for name in ("dataset", "evaluation_dataset"):
        location = str(getattr(config.data, name))
        if (
            f"{name}_commit" in known
            and location.startswith("hf://")
            and known.get(name) == _unpinned(location)
            and not _COMMIT.fullmatch(location.rpartition("@")[2])
        ):
            data[name] = f"{_unpinned(location)}@{known[f'{name}_commit']}"
    if commits := _commits(config, spec):
        datasets = [one.model_dump() for one in config.data.datasets]
        data["datasets"] = [
            {**one, "dataset": commits.get(number, one["dataset"])} for number, one in enumerate(datasets)
        ]
    if data:
        given["data"] = data
    return config.replace(**given) if given else config


def _commits(config: TrainConfig, spec: Spec) -> dict[int, str]:
    """The datasets of a mixture, by number, that the lineage trains at another revision than the configuration says."""
    known = (
        {}
        if isinstance(spec.datasets, msgspec.UnsetType)
        else {one["dataset"]: one["commit"] for one in spec.datasets if "commit" in one}
    )
    return {
        number: f"{one.unpinned}@{known[one.unpinned]}"
        for number, one in enumerate(config.data.datasets)
        if one.unpinned in known and not _COMMIT.fullmatch(one.dataset.rpartition("@")[2])
    }


def _unpinned(dataset: str) -> str:
    return dataset.partition("@")[0] if dataset.startswith("hf://") else dataset
