"""What ``from metaflow import …`` gives besides the decorators; ships ``metaflow_hf`` with every remote task."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

# Importing the package makes Metaflow see its METAFLOW_PACKAGE_POLICY.
import metaflow_hf

if TYPE_CHECKING:
    from metaflow_hf.hub.checkpoints import Checkpoint as _Checkpoint

__mf_extensions__ = "metaflow-hf"
__version__ = metaflow_hf.__version__


def load_model(reference: Mapping[str, Any] | str, path: str | None = None) -> str:
    """The files of a snapshot, model or checkpoint as a directory, anywhere: in a notebook, script or other flow.

    Into ``path`` real, writable files, beside whatever lies there; without it a fresh directory, to be removed by the
    caller. ``reference`` is the dict that a task stored, or its key. Raises the errors of ``metaflow_hf.errors``.
    """
    from metaflow_hf.hub.loading import load_reference

    return str(load_reference(reference, path))


def delete_model(reference: Mapping[str, Any] | str) -> None:
    """Forgets a model, checkpoint or entry of a snapshot; its bytes go when nothing else refers to them.

    Raises ``NotFound`` when there is none.
    """
    from metaflow_hf.store.datastore import configured_store
    from metaflow_hf.store.models import delete_reference

    delete_reference(configured_store(), reference)


def Checkpoint(temp_dir_root: str | None = None, init_dir: bool = False) -> "_Checkpoint":  # noqa: N802
    """Checkpoints outside of a step's own code: ``save``, ``load``, ``list`` and ``directory`` of
    ``current.checkpoint`` in processes that a task with ``@checkpoint`` starts; ``list(task="Flow/run/step/task")`` and
    ``load(reference)`` anywhere.

    Also a context manager. ``init_dir`` makes ``directory`` a new one instead of the task's.
    """
    from metaflow_hf.hub import checkpoints

    return checkpoints.Checkpoint(temp_dir_root, init_dir)
