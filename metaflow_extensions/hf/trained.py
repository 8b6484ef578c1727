"""Models that other runs trained, by the names that people know: a run, a flow, or the key of a reference."""

from typing import Any

from metaflow_hf.errors import SelectionError


def find_model(name: str) -> dict[str, Any]:
    """The reference of a model: of a key (``models/…``), of a run (``TrainFlow/17``), or of a flow, whose latest
    successful run is meant.

    A run's is its artifact ``model``, in whatever namespace. Raises ``SelectionError`` when there is none, ``NotFound`` for
    a key under which nothing is stored.
    """
    if name.startswith("models/"):
        from metaflow_hf.store import configured_store
        from metaflow_hf.store.models import find_reference

        return find_reference(configured_store(), name).to_json()
    from metaflow import Flow, Run, get_namespace, namespace
    from metaflow.exception import MetaflowException

    before = get_namespace()
    namespace(None)
    try:
        run = Run(name) if "/" in name else Flow(name).latest_successful_run
        reference = run.data.model
    except (MetaflowException, AttributeError) as error:
        raise SelectionError(
            f"{name!r} has no trained model: give a run that ended well (Flow/run), its flow, or a key of "
            "`metaflow hf models ls`."
        ) from error
    finally:
        namespace(before)
    return dict(reference)


def heldout_texts(reference: dict[str, Any]) -> list[Any]:
    """What the training of a model held out: texts and conversations that it was not trained on.

    Raises ``SelectionError`` for a model whose run is not there any more, or trained nothing.
    """
    from metaflow import Run, get_namespace, namespace
    from metaflow.exception import MetaflowException

    from metaflow_hf.train.job import TrainingJob

    run = "/".join(str(reference.get("pathspec", "")).split("/")[:2])
    before = get_namespace()
    namespace(None)
    try:
        job = TrainingJob.from_json(Run(run).data.job)
    except (MetaflowException, AttributeError) as error:
        raise SelectionError(
            f"the run {run!r} of {reference['key']} does not say what it held out: give texts to measure on (--text)."
        ) from error
    finally:
        namespace(before)
    return job.heldout_texts()
