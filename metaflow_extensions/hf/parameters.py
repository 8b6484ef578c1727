"""Types of parameters, and the parser of configurations: what can be known to be wrong about a value is told when it is given, and again in the task.

Schedulers hand parameters to a task through a shell script, in double quotes: `$(…)`, `${…}` and backquotes in a value
would be executed there. Names never hold such characters. Texts may, and are refused only on their way to a scheduler.
"""

import re
from collections.abc import Callable
from typing import Any, ClassVar, Final

from metaflow._vendor import click

from metaflow_extensions.hf.failures import explained
from metaflow_hf.errors import SelectionError

_EXPANDED_BY_SHELLS: Final = re.compile(r"[$`\\]")
_SCHEDULERS: Final = frozenset({"argo-workflows", "step-functions", "airflow"})


class CheckedText(click.ParamType):
    """A type for Metaflow's ``Parameter``: text that passes ``check``, which raises our errors otherwise.

    The empty text stands for a parameter that was not given, and passes.
    """

    # Metaflow notes this name with a deployment, so that other processes know how to pass values.
    __name__: ClassVar[str] = "str"

    def __init__(self, check: Callable[[str], object], name: str) -> None:
        self.name = name
        self._check = check

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        """The value itself. Raises ``Failure``."""
        with explained():
            if value:
                self._check(value)
        return str(value)


def _check_repo_id(value: str) -> None:
    from metaflow_hf.hub.names import check_repo_id

    check_repo_id(value)


def _check_model(value: str) -> None:
    from metaflow_hf.config_sections import local_directory

    if local_directory(value) is None:
        try:
            _check_repo_id(value)
        except SelectionError as error:
            raise SelectionError(f"{error} For a local directory write its path, as ./directory.") from error
    elif _on_its_way_to_a_scheduler():
        raise SelectionError(
            f"{value!r} is a directory of this machine, which the tasks of a scheduler cannot read: push the model to the hub, "
            "or save it in the datastore and pass --reference."
        )
    else:
        # What a directory may be called, but control characters.
        _refuse(value, r"[\x00-\x1f\x7f]", "a directory")


def _check_revision(value: str) -> None:
    from metaflow_hf.hub.names import check_revision

    check_revision(value)
    # The rules of git for branches and tags.
    _refuse(value, r"[\x00-\x20\x7f~^:?*\[\\$`;&|<>(){}'\"!#]|\.\.", "a revision")


def _check_name(value: str) -> None:
    _refuse(value, r"[^\w.@+=,:/ -]|(^|/)\.\.?(/|$)", "a name")


def _check_source(value: str) -> None:
    _refuse(value, r"[\x00-\x1f\x7f$`\\;]", "a dataset")
    if value.startswith("hf://"):
        from metaflow_hf.data.sources.hub import HubLocation

        location = HubLocation.parse(value)
        _check_repo_id(location.repo_id)
        _check_revision(location.revision or "main")
    elif _on_its_way_to_a_scheduler():
        _refuse(value, r"(?<![^/])\.\.(?![^/])", "a dataset that other machines could read")


def _check_text(value: str) -> None:
    if _on_its_way_to_a_scheduler() and _EXPANDED_BY_SHELLS.search(value):
        raise SelectionError(
            f"{value!r} holds one of $ ` \\, which the scheduler's shell would expand: run the flow here, or leave "
            "them out."
        )


def _refuse(value: str, characters: str, what: str) -> None:
    found = re.search(characters, value)
    if found:
        raise SelectionError(f"{value!r} is not {what}: {found[0]!r} cannot be part of one.")


def _on_its_way_to_a_scheduler() -> bool:
    context = click.get_current_context(silent=True)
    return context is not None and not _SCHEDULERS.isdisjoint(context.command_path.split())


def parse_config(content: str) -> dict[str, Any]:
    """The parser of a flow's ``Config`` of settings for training: mistakes are told before a run or deployment begins.

    What the flow's own decorators read of it (``resources``, ``rounds``) is complete.
    """
    from metaflow_hf.config import TrainConfig, parse_yaml

    with explained():
        values = parse_yaml(content)
        config = TrainConfig.parse(values)
    for check, value in (
        (model, config.model.repo_id),
        (revision, config.model.revision),
        (source, config.data.dataset),
        *((source, one.dataset) for one in config.data.datasets),
        (source, config.data.evaluation_dataset),
    ):
        check.convert(value or "", None, None)
    complete = config.model_dump(mode="json", include={"resources", "rounds"})
    return {**values, **complete}


def one_of(*allowed: str) -> CheckedText:
    """A type for one of these words."""

    def check(value: str) -> None:
        if value not in allowed:
            raise SelectionError(f"{value!r} is none of {', '.join(allowed)}.")

    return CheckedText(check, "|".join(allowed))


repo_id = CheckedText(_check_repo_id, "owner/name")
model = CheckedText(_check_model, "owner/name|directory")
revision = CheckedText(_check_revision, "revision")
source = CheckedText(_check_source, "dataset")
name = CheckedText(_check_name, "name")
text = CheckedText(_check_text, "text")
