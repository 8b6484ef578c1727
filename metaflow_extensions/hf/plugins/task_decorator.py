"""What the decorators of this extension share: the flow's datastore, the task they run in, and how they speak."""

import tempfile
from collections.abc import Callable
from errno import ENOTDIR
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metaflow.decorators import StepDecorator
from metaflow.exception import MetaflowException
from metaflow.metaflow_current import current

from metaflow_extensions.hf import neighbours
from metaflow_extensions.hf.failures import explained
from metaflow_extensions.hf.requirements import add_requirements, requirements_of

if TYPE_CHECKING:
    from metaflow_hf.hub.records import RunContext
    from metaflow_hf.store import ObjectStore


class InvalidArgument(MetaflowException):
    """A decorator was given an argument that it does not understand; told before anything runs."""

    headline = "Invalid argument"


class TaskDecorator(StepDecorator):
    """A step decorator that works on the flow's datastore within a task.

    Subclasses check their arguments in ``check_arguments`` (at the start of the run and of each task) and do their
    work in ``enter``; heavy imports belong into the latter.
    """

    def check_arguments(self) -> None:
        """Raises ``ValueError`` for arguments that cannot work."""

    def enter(self, store: "ObjectStore", run: "RunContext", find: Callable[[str], Any]) -> None:
        """Prepares the task; ``find`` gives an artifact of the flow by name, or raises ``AttributeError``."""
        raise NotImplementedError

    def leave(self) -> None:
        """Frees what the task does not need any more; called however it ends."""

    def say(self, line: str) -> None:
        """One line in the task's log."""
        self._logger(f"[@{self.name}] {line}", timestamp=False)

    def step_init(
        self,
        flow: Any,
        graph: Any,
        step_name: str,
        decorators: Any,
        environment: Any,
        flow_datastore: Any,
        logger: Any,
    ) -> None:
        self._logger = logger
        self._datastore = (flow_datastore.TYPE, flow_datastore.datastore_root)
        try:
            with requirements_of(self.name):
                self.check_arguments()
        except ValueError as error:
            raise InvalidArgument(f"@{self.name} of step {step_name!r}: {error}") from error
        add_requirements(decorators)
        if flow_datastore.TYPE == "local":
            with explained():
                _check_writable(Path(flow_datastore.datastore_root))

    def runtime_init(self, flow: Any, graph: Any, package: Any, run_id: Any) -> None:
        neighbours.tell(str(run_id), self.say)

    def task_pre_step(
        self,
        step_name: str,
        task_datastore: Any,
        metadata: Any,
        run_id: str,
        task_id: str,
        flow: Any,
        graph: Any,
        retry_count: int,
        max_user_code_retries: int,
        ubf_context: Any,
        inputs: Any,
    ) -> None:
        with requirements_of(self.name), explained():
            self._prepare(step_name, run_id, task_id, flow, inputs)

    def _prepare(self, step_name: str, run_id: str, task_id: str, flow: Any, inputs: Any) -> None:
        from metaflow import get_namespace

        from metaflow_hf import environment
        from metaflow_hf.hub.records import RunContext
        from metaflow_hf.store import datastore

        if environment.wants_embedded_hub():
            start_embedded_hub()
        datastore.activate(*self._datastore)
        run = RunContext(
            flow=flow.name,
            run=str(run_id),
            step=step_name,
            task=str(task_id),
            # `current.namespace` is the user's own even in a run with another one.
            namespace=get_namespace() or "",
            origin_run=current.origin_run_id,
        )
        self.enter(datastore.configured_store(), run, lambda name: _artifact(flow, inputs, name))

    def task_decorate(
        self,
        step_func: Callable[..., Any],
        flow: Any,
        graph: Any,
        retry_count: int,
        max_user_code_retries: int,
        ubf_context: Any,
    ) -> Callable[..., Any]:
        @wraps(step_func)
        def run(*args: Any, **kwargs: Any) -> Any:
            with explained():
                return step_func(*args, **kwargs)

        return run

    def task_finished(
        self,
        step_name: str,
        flow: Any,
        graph: Any,
        is_task_ok: bool,
        retry_count: int,
        max_user_code_retries: int,
    ) -> None:
        self.leave()


def _check_writable(root: Path) -> None:
    """Raises ``StoreUnavailable`` where a local datastore cannot be written: Metaflow would fail less clearly."""
    place = root
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        if not place.is_dir():
            raise NotADirectoryError(ENOTDIR, f"{place} is not a directory")
        # Permissions say nothing about root and read-only file systems.
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        from metaflow_hf.errors import StoreUnavailable

        raise StoreUnavailable(
            f"the datastore {root} cannot be written: {error.strerror}. Make it writable, or choose another place by "
            "METAFLOW_DATASTORE_SYSROOT_LOCAL."
        ) from error


def start_embedded_hub() -> str:
    """Starts this process's own hub, unless it runs already; returns its URL."""
    from metaflow_hf.demo.embedded import ensure_running

    return ensure_running()


def _artifact(flow: Any, inputs: Any, name: str) -> Any:
    """An artifact of the task; in a join, of those inputs that have it, which must agree."""
    if hasattr(flow, name):
        return getattr(flow, name)
    found = [datastore[name] for datastore in inputs or () if name in datastore]
    if not found:
        raise AttributeError(name)
    if any(value != found[0] for value in found[1:]):
        from metaflow_hf.errors import SelectionError

        raise SelectionError(
            f"the branches that meet here have different values of {name!r}: choose one with merge_artifacts and load "
            "it in the next step, or by current.model.load."
        )
    return found[0]
