"""``@pinned_gpus``: each branch of a foreach on a machine sees its own GPUs, from before its Python starts."""

from typing import Any, ClassVar

from metaflow.decorators import StepDecorator

from .task_decorator import InvalidArgument


class PinnedGpusDecorator(StepDecorator):
    """Shows the i-th branch of a foreach the i-th GPUs of this machine only, before its Python starts.

    The GPUs are those of CUDA_VISIBLE_DEVICES of the run, as they are written there, else all. With more branches than
    GPUs several share one. Does nothing on machines without GPUs, outside of a foreach, and where a branch has a machine
    of its own.

    Parameters
    ----------
    per_branch : int, default: 1
        How many GPUs a branch gets.

    """

    name = "pinned_gpus"
    defaults: ClassVar[dict[str, Any]] = {"per_branch": 1}

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
        count = self.attributes["per_branch"]
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise InvalidArgument(
                f"@pinned_gpus of step {step_name!r}: per_branch={count!r} is no number of GPUs."
            )

    def runtime_step_cli(
        self, cli_args: Any, retry_count: int, max_user_code_retries: int, ubf_context: Any
    ) -> None:
        from metaflow_hf.train.devices import share_of, visible_gpus

        branch = cli_args.command_options.get("split-index")
        # A scheduler's command runs elsewhere.
        if branch is None or cli_args.commands[:1] != ["step"] or not (gpus := visible_gpus()):
            return
        chosen = share_of(gpus, int(branch), int(self.attributes["per_branch"]))
        cli_args.env["CUDA_VISIBLE_DEVICES"] = ",".join(chosen)
