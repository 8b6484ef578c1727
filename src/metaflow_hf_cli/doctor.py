"""``metaflow hf doctor``: what works here, and how to fix what does not."""

from metaflow._vendor import click

from metaflow_hf_cli.checks.findings import Finding

from .output import explained, json_option, print_json, printable

_MARKS = {"ok": "ok", "warning": "warn", "problem": "FAIL"}


@click.command(
    short_help="What works here, and how to fix what does not.",
    help="Look at versions, the extension, the datastore, the hub, clocks, GPUs, memory and disks. Each thing that is not "
    "well comes with what to do. Writes and deletes one small object in the datastore. Exit status 1 when something "
    "does not work.",
)
@click.option(
    "--model",
    metavar="REPO",
    help="Only: can this model be trained at long context, and how long? org/name, org/name@revision, or a directory. "
    "Reads its config.json, no weights.",
)
@click.option(
    "--chunk-size",
    type=click.IntRange(min=2),
    default=2048,
    show_default=True,
    help="For --model, in tokens.",
)
@json_option
@explained
def command(model: str | None, chunk_size: int, as_json: bool) -> None:
    """One line per finding; of one model with ``--model``."""
    if model is not None:
        from .doctor_model import show

        show(model, chunk_size, as_json)
        return
    from metaflow_hf_cli.checks import all_checks

    found: list[Finding] = []
    for check in all_checks():
        for finding in check.findings():
            found.append(finding)
            if not as_json:
                _show(finding)
    problems = sum(finding.status == "problem" for finding in found)
    if as_json:
        print_json([finding.to_json() for finding in found])
    else:
        warnings = sum(finding.status == "warning" for finding in found)
        click.echo(_verdict(problems, warnings))
    if problems:
        raise SystemExit(1)


def _show(finding: Finding) -> None:
    click.echo(f"{_MARKS[finding.status]:<4}  {finding.subject:<9}  {printable(finding.message)}")
    if finding.fix:
        click.echo(f"{'':<17}-> {printable(finding.fix)}")


def _verdict(problems: int, warnings: int) -> str:
    if not problems and not warnings:
        return "Everything works."
    parts = [f"{problems} to fix"] if problems else []
    parts += [f"{warnings} to think about"] if warnings else []
    return f"{' and '.join(parts)}: see the lines that begin with ->."
