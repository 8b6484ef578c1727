"""What the commands about configurations share: the file, the parameters of a flow, and the hub that they name."""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from metaflow._vendor import click

from metaflow_hf import environment

if TYPE_CHECKING:
    from metaflow_hf.config_sources import Setting
    from metaflow_hf.train.dry_run import DryRun
    from metaflow_hf.train.job import TrainingJob

RUN: Final = "TrainFlow"

config_argument = click.argument("config", type=click.Path(exists=True, dir_okay=False), metavar="CONFIG")
_PARAMETERS: Final = (
    click.option(
        "--repo_id", help="Model to start from (owner/name or ./directory), instead of model.repo_id."
    ),
    click.option("--revision", help="Its branch, tag or commit."),
    click.option("--reference", help="Model of this datastore to go on from."),
    click.option("--dataset", help="What to train on, instead of data.dataset."),
    click.option("--num_gpus", type=int, help="Branches; 0: all GPUs of this machine."),
    click.option("--lineage", help="Name of the training."),
    click.option("--max_tokens", type=int, help="Stop at so many tokens."),
)


def flow_parameters(command: Callable[..., None]) -> Callable[..., None]:
    """The parameters of ``train_flow.py``, spelt as there."""
    return functools.reduce(lambda decorated, option: option(decorated), reversed(_PARAMETERS), command)


def read_job(config: str, parameters: Mapping[str, Any]) -> "tuple[TrainingJob, list[Setting]]":
    """The job that a file and the parameters describe, and where its values come from. Raises ``ConfigError``."""
    from metaflow_hf.config import TrainConfig, read_yaml
    from metaflow_hf.config_sources import settings_of
    from metaflow_hf.train.job import TrainingJob

    path = Path(config)
    given = read_yaml(path)
    before = TrainConfig.parse(given, where=path.name)
    job = TrainingJob.configured(given, run=RUN, **parameters)
    return job, settings_of(job.config, given, where=path.name, before=before)


@contextmanager
def looked_at(config: str, parameters: Mapping[str, Any]) -> "Iterator[tuple[DryRun, list[Setting]]]":
    """The dry run of a file and parameters."""
    from metaflow_extensions.hf.trained import find_model
    from metaflow_hf.train.dry_run import dry_run

    job, settings = read_job(config, parameters)
    with dry_run(job, connect=_connector(), find_model=find_model) as run:
        yield run, settings


def _connector() -> Callable[[str | None], object]:
    first = environment.hub_endpoint()

    def connect(hub: str | None) -> None:
        from metaflow_extensions.hf.plugins.task_decorator import start_embedded_hub

        if hub == "embedded" or (hub is None and environment.wants_embedded_hub()):
            start_embedded_hub()
        else:
            environment.use_hub(hub or first)

    return connect
