"""What a configuration needs besides its data: packages of extras, tasks of the harness, the right to publish.

Looked for when a run begins, so that no hour of training ends with something that could have been known before.
"""

import logging
from collections.abc import Iterator
from importlib.util import find_spec
from typing import NamedTuple

from metaflow_hf import environment
from metaflow_hf.config import PublishConfig, TrainConfig
from metaflow_hf.errors import ConfigError, HubUnavailable

logger = logging.getLogger("metaflow_hf.train")


class _Need(NamedTuple):
    """A setting that needs a module, and the extra that installs it."""

    setting: str
    module: str
    extra: str


def check_prerequisites(config: TrainConfig) -> None:
    """Raises ``ConfigError`` for packages that are not installed here (all at once), for tasks that the harness does
    not know, and where the hub would refuse the model that is to be published.
    """
    missing = [need for need in _needs(config) if find_spec(need.module) is None]
    if missing:
        told = ", ".join(f"{need.setting} needs {need.module}" for need in missing)
        extras = ",".join(dict.fromkeys(need.extra for need in missing))
        raise ConfigError(
            f"{told}: not installed here. Install what is missing by `pip install 'metaflow-hf[{extras}]'`, or take it "
            "out of the configuration."
        )
    if config.evaluation.harness is not None:
        # Imports torch.
        from metaflow_hf.train.harness import known_tasks

        known_tasks(config.evaluation.harness)
    _check_publishing(config.publish, config.hub)


def _needs(config: TrainConfig) -> Iterator[_Need]:
    if config.model.lora is not None:
        yield _Need("model.lora", "peft", "peft")
    if config.optimizer.name == "adamw_8bit":
        yield _Need("optimizer.name: adamw_8bit", "bitsandbytes", "bitsandbytes")
    if config.evaluation.harness is not None:
        yield _Need("evaluation.harness", "lm_eval", "lm-eval")
    for tracker in config.report.trackers:
        yield _Need(f"report.trackers: {tracker}", tracker, tracker)


def _check_publishing(settings: PublishConfig, hub: str | None) -> None:
    """Whether the hub knows whose token this is; whether that user may write there only the push itself tells."""
    if settings.repo_id is None or settings.dry_run:
        return
    from metaflow_hf.hub.endpoint import Endpoint
    from metaflow_hf.hub.reaching import has_token, reach

    wanted = f"publish.repo_id: the model could not be pushed to {settings.repo_id} at the end"
    remedy = "or set publish.dry_run: true and push later (metaflow hf models push)."
    if environment.is_offline():
        raise ConfigError(f"{wanted}: HF_HUB_OFFLINE is set. Unset it, {remedy}")
    if not has_token():
        raise ConfigError(f"{wanted}: there is no token. Export HF_TOKEN=… or run `hf auth login`, {remedy}")
    if hub == "embedded":
        # What the run reads from is not where it pushes to, and which that is the last step alone knows.
        return
    try:
        found = reach(Endpoint.of(hub))
    except HubUnavailable as error:
        logger.warning("whether the model can be published is not known: %s", error)
        return
    if not found.user:
        raise ConfigError(
            f"{wanted}: the hub does not accept the token in HF_TOKEN (or in the token file). Make a new one that may "
            f"write there, {remedy}"
        )
