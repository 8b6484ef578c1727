"""``@model``: models, snapshots and checkpoints by reference, and saving of new models."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from metaflow.metaflow_current import current

from .task_decorator import TaskDecorator

if TYPE_CHECKING:
    from metaflow_hf.hub.loadspec import ModelEntry
    from metaflow_hf.hub.records import RunContext
    from metaflow_hf.hub.task_models import TaskModels
    from metaflow_hf.store import ObjectStore


class ModelDecorator(TaskDecorator):
    """Loads what references point to, whichever step, run or flow made them, and saves models of this task. Adds
    ``current.model``.

    Parameters
    ----------
    load : Union[str, Tuple[str, str], Dict[str, str], List[Any], None], default: None
        Names of artifacts that hold references (or keys): "name", ("name", "path"), {"name": "path"}, or a list of
        these. The paths are in `current.model.loaded`.
    best_effort_load : bool, default: False
        Say what could not be loaded and go on, instead of failing the task.
    temp_dir_root : str, default: None
        Where directories are made for what is loaded without a path. By default beside the node's cache.
    materialize : str, default: None
        "copy" makes every loaded file a writable one of its own; "auto" may link large ones read-only to this
        machine's cache. By default what METAFLOW_HF_MATERIALIZE says, else "auto".

    MF Add To Current
    -----------------
    model -> metaflow_hf.hub.task_models.TaskModels
        Loads by reference or key, saves under this task.

        @@ Returns
        -------
        TaskModels

    """

    name = "model"
    defaults: ClassVar[dict[str, Any]] = {
        "load": None,
        "best_effort_load": False,
        "temp_dir_root": None,
        "materialize": None,
    }
    _entries: "list[ModelEntry]"
    _models: "TaskModels | None" = None

    def check_arguments(self) -> None:
        from metaflow_hf.hub.linking import may_link
        from metaflow_hf.hub.loadspec import parse_models

        may_link(self.attributes["materialize"])
        self._entries = parse_models(self.attributes["load"])

    def enter(self, store: "ObjectStore", run: "RunContext", find: Callable[[str], Any]) -> None:
        from metaflow_hf.hub.task_models import MISSING, TaskModels

        def find_or_missing(name: str) -> Any:
            try:
                return find(name)
            except AttributeError:
                return MISSING

        self._models = TaskModels(
            store,
            run=run,
            say=self.say,
            temp_dir_root=self.attributes["temp_dir_root"],
            materialize=self.attributes["materialize"],
        )
        current._update_env({"model": self._models})  # noqa: SLF001
        self._models.load_entries(
            self._entries, find_or_missing, best_effort=bool(self.attributes["best_effort_load"])
        )

    def leave(self) -> None:
        if self._models is not None:
            self._models.close()
