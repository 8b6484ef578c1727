"""The plan before training and the summary at its end, as aligned plain text for logs and terminals.

Pure functions: values in, text out. Text that models or users wrote is made harmless for terminals: control
characters appear as escapes, never as what they do.
"""

import json
import textwrap
from collections.abc import Mapping, Sequence

from metaflow_hf.events import Evaluated
from metaflow_hf.report import mixture_tables, units
from metaflow_hf.report.outcome import Outcome, Plan, load_snippet, sample_pairs

_WIDTH = 100
_COMMIT_DIGITS = 12
_EXAMPLE_CHARACTERS = 600


def plain(text: str) -> str:
    """The text with control characters (line ends and tabs excepted) and line separators as escapes."""
    return "".join(
        char if char in "\n\t" or char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in text
    )


def named_revision(name: str, commit: str) -> str:
    """``gpt2 @ 607a30d783df``."""
    return f"{name} @ {commit[:_COMMIT_DIGITS]}" if commit else name


def ruled(text: str) -> str:
    """The text with a rule at its left: task logs cut leading spaces off, and with them every indentation."""
    return "\n".join(f"│ {line}".rstrip() for line in text.splitlines())


def plan_text(plan: Plan) -> str:
    """The plan as a block of aligned lines; what is not known is left out."""
    lines = _aligned([(label, value) for label, value in plan_rows(plan) if value])
    notes = [textwrap.fill(f"note: {plain(note)}", _WIDTH, subsequent_indent="      ") for note in plan.notes]
    datasets = mixture_tables.plan_rows(plan)
    mixture = columns([mixture_tables.PLAN_HEADERS, *datasets]) if datasets else []
    return "\n".join(["Plan", *indented([*lines, *mixture, *notes, *_example(plan)])])


def plan_rows(plan: Plan) -> list[tuple[str, str]]:
    """The plan as (label, value with unit); an empty value means not known."""
    return [
        ("base model", plain(named_revision(plan.base_model, plan.model_commit))),
        ("parameters", _parameters(plan)),
        ("dataset", plain(named_revision(plan.dataset, plan.dataset_commit))),
        ("format", _format(plan)),
        ("samples", _samples(plan)),
        ("tokens", _tokens(plan)),
        ("claims", _claims(plan)),
        ("steps", _steps(plan)),
        ("rounds", f"about {units.count(plan.rounds)}" if plan.rounds else ""),
        ("workers", units.count(plan.workers)),
        ("memory", _memory(plan)),
        ("disk", _parts(plan.disk)),
        ("time", f"about {units.duration(plan.seconds)}" if plan.seconds is not None else ""),
        ("lineage", plain(plan.lineage)),
    ]


def _memory(plan: Plan) -> str:
    if not plan.memory_bytes:
        return ""
    total = f"about {units.byte_size(plan.memory_bytes)} a worker"
    return (
        f"{total}: {_parts(plan.memory)}" if plan.memory else f"{total} for weights, gradients and optimizer"
    )


def _parts(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {units.byte_size(size)}" for name, size in sizes.items() if size)


def _parameters(plan: Plan) -> str:
    if not plan.parameters:
        return ""
    if plan.trainable_parameters is None or plan.trainable_parameters == plan.parameters:
        return f"{units.short_count(plan.parameters)}, all trained"
    share = 100 * plan.trainable_parameters / plan.parameters
    return (
        f"{units.short_count(plan.parameters)}, {units.short_count(plan.trainable_parameters)} of them trained "
        f"({share:.2g} %)"
    )


def _samples(plan: Plan) -> str:
    if not plan.samples:
        return ""
    parts = [units.count(plan.samples)]
    if plan.heldout_samples:
        parts.append(f"{units.count(plan.heldout_samples)} more held out")
    parts += [f"{units.count(number)} skipped: {plain(reason)}" for reason, number in plan.skipped.items()]
    return ", ".join(parts)


def _format(plan: Plan) -> str:
    columns = ", ".join(f"{role}: {column}" for role, column in plan.columns.items())
    return plain(f"{plan.format} ({columns})") if plan.format else ""


def _tokens(plan: Plan) -> str:
    if not plan.tokens:
        return ""
    about = "" if plan.is_exact else "about "
    share = f", {100 * plan.labelled_fraction:.0f} % of all carry loss" if plan.labelled_fraction else ""
    return (
        f"{about}{units.count(plan.tokens)} with loss{share}"
        if share
        else f"{about}{units.count(plan.tokens)}"
    )


def _example(plan: Plan) -> list[str]:
    """A rendered sequence; what carries no loss is in brackets."""
    if not plan.example:
        return []
    shown = "".join(text if has_loss else f"⟦{text}⟧" for has_loss, text in plan.example)
    if len(shown) > _EXAMPLE_CHARACTERS:
        shown = f"{shown[:_EXAMPLE_CHARACTERS]} …"
    return ["example, ⟦without loss⟧:", *indented(plain(shown).splitlines())]


def _claims(plan: Plan) -> str:
    if not plan.claims:
        return ""
    return units.count(plan.claims) + (
        f", of {units.count(plan.claim_samples)} samples each" if plan.claim_samples else ""
    )


def _steps(plan: Plan) -> str:
    if not plan.steps:
        return ""
    shape = (
        f" of {plan.batch_size} sequence{'s' * (plan.batch_size != 1)} x {units.count(plan.sequence_length)} tokens"
        if plan.batch_size and plan.sequence_length
        else ""
    )
    real = (
        f", {plan.batch_sequences:.1f} on average"
        if 0 < plan.batch_sequences < 0.75 * plan.batch_size
        else ""
    )
    return f"about {units.count(plan.steps)}{shape}{real}"


def summary_text(outcome: Outcome) -> str:
    """The outcome as a block of text: quality before and after, samples, the reference and how to load it."""
    sections = [
        ("Result", _result(outcome)),
        ("Held-out text", evaluation_lines(outcome)),
        ("Datasets", _datasets(outcome)),
        ("Tasks", columns([TASK_HEADERS, *task_rows(outcome)]) if outcome.tasks else []),
        ("Samples", _samples_lines(outcome)),
        ("Model", _model(outcome)),
    ]
    return "\n\n".join("\n".join([title, *indented(lines)]) for title, lines in sections if lines)


def _result(outcome: Outcome) -> list[str]:
    plan = outcome.plan
    rate = f" ({units.short_count(outcome.tokens / outcome.seconds)} tokens/s)" if outcome.seconds > 0 else ""
    rows = [
        ("base model", plain(named_revision(plan.base_model, plan.model_commit))),
        ("dataset", plain(named_revision(plan.dataset, plan.dataset_commit))),
        (
            "trained",
            f"{units.count(outcome.tokens)} tokens in {units.duration(outcome.seconds)}{rate}"
            if outcome.tokens
            else "",
        ),
        (
            "skipped",
            f"{units.count(outcome.skipped_positions)} claims failed again and again and are in no model"
            if outcome.skipped_positions
            else "",
        ),
    ]
    return _aligned([row for row in rows if row[1]])


def evaluation_rows(outcome: Outcome) -> list[tuple[str, str, str, str]]:
    """(name, loss, perplexity, bits per byte) of everything measured on the held-out text."""

    def row(name: str, figures: Evaluated) -> tuple[str, str, str, str]:
        return (
            name,
            f"{figures.loss:.3f}",
            units.perplexity(figures.perplexity),
            f"{figures.bits_per_byte:.3f}",
        )

    measured = (
        ("before training", outcome.before),
        ("after training", outcome.after),
        ("unigram model", outcome.unigram),
    )
    rows = [row(name, figures) for name, figures in measured if figures is not None]
    if outcome.xz_bits_per_byte is not None:
        rows.append(("xz -9", "", "", f"{outcome.xz_bits_per_byte:.3f}"))
    return rows


def task_rows(outcome: Outcome) -> list[tuple[str, str, str, str]]:
    """(task, metric, before, after) of lm-evaluation-harness."""
    return [
        (plain(one.task), plain(one.metric), f"{one.before:.4f}", f"{one.after:.4f}") for one in outcome.tasks
    ]


TASK_HEADERS = ("task", "metric", "before", "after")
EVALUATION_HEADERS = ("", "loss (nats/token)", "perplexity", "bits per byte")


def heldout_size(outcome: Outcome) -> str:
    """``12,345 tokens, 44 KiB of text``, and whose; "" when nothing was measured."""
    figures = outcome.after or outcome.before
    if figures is None:
        return ""
    whose = f" in the {figures.counted}'s turns" if figures.counted else ""
    return f"{units.count(figures.tokens)} tokens, {units.byte_size(figures.bytes)} of text{whose}"


def evaluation_lines(outcome: Outcome) -> list[str]:
    """The evaluation as an aligned table, numbers to the right."""
    rows = evaluation_rows(outcome)
    if not rows:
        return []
    size = heldout_size(outcome)
    table = columns([EVALUATION_HEADERS, *rows])
    return [*table, f"measured on {size} that no worker trained on"] if size else table


def _datasets(outcome: Outcome) -> list[str]:
    """What was trained of each dataset of a mixture, and the losses of its held-out rows."""
    rows = mixture_tables.result_rows(outcome)
    return columns([mixture_tables.RESULT_HEADERS, *rows]) if rows else []


def _samples_lines(outcome: Outcome) -> list[str]:
    lines: list[str] = []
    for prompt, before, after in sample_pairs(outcome.samples):
        lines.append(f"prompt: {json.dumps(prompt, ensure_ascii=False)}")
        for name, text in (("before", before), ("after", after)):
            if text is not None:
                lines += _quoted(name, text)
    return lines


def _quoted(name: str, text: str) -> list[str]:
    wrapped = [
        piece
        for line in plain(text).splitlines() or [""]
        for piece in textwrap.wrap(line, _WIDTH - 12, drop_whitespace=False) or [""]
    ]
    return [f"{name if number == 0 else '':<6} | {piece}" for number, piece in enumerate(wrapped)]


def _model(outcome: Outcome) -> list[str]:
    lines: list[str] = []
    if outcome.model is not None:
        reference = json.dumps(outcome.model, indent=2, ensure_ascii=False).splitlines()
        lines += ["reference", *indented(reference), "load it, wherever this datastore is configured, by"]
        lines += indented(load_snippet(outcome).splitlines())
    if outcome.card:
        lines.append(f"card  {plain(outcome.card)}")
    return lines


def _aligned(rows: Sequence[tuple[str, str]]) -> list[str]:
    width = max((len(label) for label, _ in rows), default=0)
    return [f"{label:<{width}}  {value}" for label, value in rows]


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as aligned lines; the first column stands left, the others right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            f"{cell:<{width}}" if column == 0 else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def indented(lines: Sequence[str]) -> list[str]:
    """The lines two spaces to the right; empty ones stay empty."""
    return [f"  {line}" if line else "" for line in lines]
