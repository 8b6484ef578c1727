"""Tasks of EleutherAI's lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness), by its own API."""

from importlib import import_module
from typing import Any

from torch import nn

from metaflow_hf.config import HarnessConfig
from metaflow_hf.errors import ConfigError


def run_harness(model: nn.Module, tokenizer: Any, settings: HarnessConfig) -> dict[tuple[str, str], float]:
    """(task, metric) -> figure, for every figure that the tasks report.

    The same as ``lm_eval.simple_evaluate`` with these settings gives; standard errors are left out. Tasks bring their
    datasets from the hub unless they name local files. Needs the extra ``lm-eval``; raises ``ConfigError`` without it and
    for tasks that the harness does not know.
    """
    lm_eval, tasks = _package(), known_tasks(settings)
    adapter = import_module("lm_eval.models.huggingface").HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=settings.batch_size
    )
    was_training = model.training
    try:
        found = lm_eval.simple_evaluate(
            model=adapter,
            tasks=list(settings.tasks),
            num_fewshot=settings.num_fewshot,
            limit=settings.limit,
            task_manager=tasks,
            bootstrap_iters=0,
            log_samples=False,
        )
    finally:
        model.train(was_training)
    return {
        (task, metric.removesuffix(",none")): float(value)
        for task, figures in found["results"].items()
        for metric, value in figures.items()
        if isinstance(value, (int, float))
        and "_stderr" not in metric
        and metric not in ("alias", "sample_len")
    }


def known_tasks(settings: HarnessConfig) -> Any:
    """The harness's ``TaskManager``, which knows all of ``settings.tasks``. Raises ``ConfigError`` as ``run_harness``."""
    _package()
    tasks = import_module("lm_eval.tasks").TaskManager(include_path=settings.include_path)
    unknown = [name for name in settings.tasks if not tasks.match_tasks([name])]
    if unknown:
        raise ConfigError(
            f"evaluation.harness.tasks: lm-eval knows no task {', '.join(map(repr, unknown))}. See "
            "`lm-eval ls tasks`, or name the directory of your own by evaluation.harness.include_path."
        )
    return tasks


def _package() -> Any:
    try:
        return import_module("lm_eval")
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise ConfigError(
            "evaluation.harness: lm-eval is not installed. Install it by `pip install 'metaflow-hf[lm-eval]'`, or take the "
            "section out of the configuration."
        ) from error
