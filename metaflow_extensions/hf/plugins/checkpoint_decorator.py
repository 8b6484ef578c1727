"""``@checkpoint``: a task that goes on where it, or an earlier one in its place, stopped."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from metaflow.metaflow_current import current

from .task_decorator import TaskDecorator

logger = logging.getLogger("metaflow_hf.hub")

if TYPE_CHECKING:
    from metaflow_hf.hub.checkpoints import TaskCheckpoints
    from metaflow_hf.hub.records import RunContext
    from metaflow_hf.store import ObjectStore


class CheckpointDecorator(TaskDecorator):
    """Saves checkpoints of a task in the flow's datastore and loads the right one when the task begins. Adds
    ``current.checkpoint``, also for the processes that the task starts (``from metaflow import Checkpoint``).

    Parameters
    ----------
    load_policy : str, default: "fresh"
        What is in `current.checkpoint.directory` when the task begins: "fresh" the newest checkpoint of this very
        task (a retry goes on) or of the run that is resumed, "eager" else the newest that any run saved for this
        step and branch, "none" nothing.
    temp_dir_root : str, default: None
        Where directories are made. By default beside the node's cache.
    show_card : bool, default: None
        Accepted for flows written for other extensions, and ignored: no card is attached.

    MF Add To Current
    -----------------
    checkpoint -> metaflow_hf.hub.checkpoints.TaskCheckpoints
        Saves, lists and loads checkpoints of this task.

        @@ Returns
        -------
        TaskCheckpoints

    """

    name = "checkpoint"
    defaults: ClassVar[dict[str, Any]] = {"load_policy": "fresh", "temp_dir_root": None, "show_card": None}
    _checkpoints: "TaskCheckpoints | None" = None

    def check_arguments(self) -> None:
        policy = self.attributes["load_policy"]
        if policy not in ("fresh", "eager", "none"):
            raise ValueError(f"load_policy={policy!r} is none of fresh, eager, none.")
        if self.attributes["show_card"] is not None:
            logger.debug("show_card has no meaning here and is ignored")

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
        from metaflow_hf.store.branches import task_identifier

        self._attempt = retry_count
        self._identifier = task_identifier(_foreach_values(flow))
        # How often a step that comes back to itself has run; Metaflow keeps one level.
        self._iteration = sum(getattr(flow, "_iteration_stack", None) or ())
        super().task_pre_step(
            step_name,
            task_datastore,
            metadata,
            run_id,
            task_id,
            flow,
            graph,
            retry_count,
            max_user_code_retries,
            ubf_context,
            inputs,
        )

    def enter(self, store: "ObjectStore", run: "RunContext", find: Callable[[str], Any]) -> None:
        from metaflow_hf.hub.checkpoints import TaskCheckpoints
        from metaflow_hf.store.checkpoints import CheckpointTask

        who = CheckpointTask(
            flow=run.flow,
            run=run.run,
            step=run.step,
            task=run.task,
            attempt=self._attempt,
            namespace=run.namespace,
            identifier=self._identifier,
            origin_run=run.origin_run,
            iteration=self._iteration,
        )
        self._checkpoints = TaskCheckpoints(store, who, temp_dir_root=self.attributes["temp_dir_root"])
        current._update_env({"checkpoint": self._checkpoints})  # noqa: SLF001
        loaded = self._checkpoints.begin(self.attributes["load_policy"])
        if loaded is not None:
            self.say(
                f"Loaded checkpoint {loaded.name} (version {loaded.version}) of {loaded.pathspec}: {loaded.key}"
            )
        self._checkpoints.share(*self._datastore)

    def leave(self) -> None:
        if self._checkpoints is not None:
            self._checkpoints.close()


def _foreach_values(flow: Any) -> list[Any]:
    """The values that this task's branch is about."""
    from metaflow_hf.store.branches import branch_value

    known = dict(flow._cached_input)  # noqa: SLF001
    values = [branch_value(index, value) for index, _, value in flow.foreach_stack() or ()]
    # Looking must not change what the step itself sees later, when artifacts are merged.
    flow._cached_input = known  # noqa: SLF001
    return values
