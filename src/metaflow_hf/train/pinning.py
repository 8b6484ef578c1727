"""Branches and tags move; a lineage stays with the commits that it was started from."""

import re
from typing import Any, Final

from metaflow_hf.config import TrainConfig
from metaflow_hf.train.records import Spec

_COMMIT: Final = re.compile(r"[0-9a-f]{40}")


def sources_of(
    config: TrainConfig, *, model_commit: str | None, dataset_commit: str | None
) -> dict[str, str]:
    """What a specification keeps of where model and data came from; no part of its digest."""
    facts = {
        "model": config.model.repo_id,
        "model_commit": model_commit,
        "dataset": _unpinned(str(config.data.dataset)),
        "dataset_commit": dataset_commit,
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
    dataset = str(config.data.dataset)
    revision = dataset.rpartition("@")[2]
    if (
        "dataset_commit" in known
        and dataset.startswith("hf://")
        and known.get("dataset") == _unpinned(dataset)
        and not _COMMIT.fullmatch(revision)
    ):
        given["data"] = {"dataset": f"{_unpinned(dataset)}@{known['dataset_commit']}"}
    return config.replace(**given) if given else config


def _unpinned(dataset: str) -> str:
    return dataset.partition("@")[0] if dataset.startswith("hf://") else dataset
