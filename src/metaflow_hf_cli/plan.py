"""``metaflow hf plan``: what a run would do, told without running it."""

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from metaflow._vendor import click

from .configured import config_argument, flow_parameters, looked_at
from .output import explained, json_option, print_json, printable
from .validate import spell

if TYPE_CHECKING:
    from metaflow_hf.report.outcome import Plan


def data_of(plan: "Plan") -> dict[str, Any]:
    """What a plan says about the rows: how they are read, and what becomes of them."""
    return {
        "format": plan.format,
        "columns": dict(plan.columns),
        "rows": {
            "total": plan.rows,
            "trained": plan.samples,
            "held_out": plan.heldout_rows,
            "skipped": dict(plan.skipped),
        },
        "tokens": plan.tokens,
        "labelled_fraction": plan.labelled_fraction,
        "batch_sequences": plan.batch_sequences,
        "is_exact": plan.is_exact,
        "datasets": [dict(one) for one in plan.datasets],
    }


@click.command(
    short_help="What a configuration would do.",
    help="Tell what training by CONFIG would do: tokens, steps, rounds, memory by part, disk, and time by trying some "
    "passes on this machine (about 20 seconds). Reads the model's configuration, its tokenizer and the beginning of the "
    "dataset; needs no GPU and stores nothing.",
)
@config_argument
@flow_parameters
@click.option(
    "--tokens-per-second",
    type=click.FloatRange(min=1),
    help="Speed of one worker, instead of trying here.",
)
@json_option
@explained
def command(config: str, tokens_per_second: float | None, as_json: bool, **parameters: Any) -> None:
    """The plan, and the values that are not defaults."""
    from metaflow_hf.report import plan_text

    with looked_at(config, parameters) as (run, settings):
        # A run that is given no name takes its own.
        plan = replace(run.plan(tokens_per_second=tokens_per_second), lineage=parameters["lineage"] or "")
    chosen = [one for one in settings if one.source]
    if as_json:
        print_json({**data_of(plan), "plan": asdict(plan), "settings": [asdict(one) for one in chosen]})
        return
    click.echo(plan_text(plan))
    click.echo("\nSettings that are not defaults")
    width = max((len(one.path) for one in chosen), default=0)
    for one in chosen:
        click.echo(printable(f"  {one.path:<{width}}  {spell(one.value)}  ({one.source})"))
