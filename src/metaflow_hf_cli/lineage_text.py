"""Where a model is from, as lines for people."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from metaflow_hf.report import units
from metaflow_hf.report.text import named_revision

if TYPE_CHECKING:
    from metaflow_hf.train.provenance import Provenance


def provenance_lines(found: "Provenance") -> Iterator[str]:
    """The facts of one model, one a line; what is not known is left out."""
    yield found.key
    for label, value in _rows(found):
        if value:
            yield f"  {label:<14}  {value}"


def _rows(found: "Provenance") -> list[tuple[str, str]]:
    sources = found.sources
    return [
        ("digest", found.digest),
        ("saved", f"{found.created_on} by {found.pathspec}"),
        ("run", found.run),
        ("lineage", found.lineage),
        ("began with", named_revision(sources.get("model", ""), sources.get("model_commit", ""))),
        ("", f"commit {sources['model_commit']}" if "model_commit" in sources else ""),
        ("dataset", named_revision(sources.get("dataset", ""), sources.get("dataset_commit", ""))),
        ("", f"commit {sources['dataset_commit']}" if "dataset_commit" in sources else ""),
        *_datasets(found),
        ("block manifest", " ".join(filter(None, (found.dataset.get("key"), _digest(found))))),
        ("order", ", ".join(f"{name} {value}" for name, value in found.order.items() if name != "datasets")),
        ("chunks", _chunks(found)),
        ("claims", _claims(found)),
        ("tokens", units.count(found.tokens) if found.tokens else ""),
        ("rounds", _rounds(found)),
        ("held-out text", _figures(found)),
    ]


def _datasets(found: "Provenance") -> list[tuple[str, str]]:
    """The datasets of a mixture, each with its source and the rows that the whole run trains."""
    described = found.order.get("datasets", ())
    return [
        (
            "" if number else "mixture of",
            f"{one['name']}: {named_revision(one['dataset'], one.get('commit', ''))}, {units.count(part['rows'])} rows",
        )
        for number, (one, part) in enumerate(zip(found.datasets, described, strict=True))
    ]


def _digest(found: "Provenance") -> str:
    digest = found.dataset.get("digest", "")
    return f"(sha256 {digest[:12]})" if digest else ""


def _chunks(found: "Provenance") -> str:
    if found.chunks_total is None:
        return ""
    return f"{units.count(found.chunks_done or 0)} of {units.count(found.chunks_total)} are in the model"


def _claims(found: "Provenance") -> str:
    if not found.positions_total:
        return ""
    done = sum(stop - start for start, stop in found.positions)
    skipped = sum(stop - start for start, stop in found.skipped)
    left_out = f", {units.count(skipped)} skipped" if skipped else ""
    return f"{units.count(done)} of {units.count(found.positions_total)} are in the model{left_out}"


def _rounds(found: "Provenance") -> str:
    if not found.rounds:
        return ""
    attempts = {attempt for one in found.rounds for attempt in one.contributions}
    contributions = sum(len(one.contributions) for one in found.rounds)
    lost = sum(one.lost for one in found.rounds)
    said = f"{len(found.rounds)}, {contributions} contributions of {len(attempts)} workers"
    return said + (f", {units.count(lost)} claims lost and trained again" if lost else "")


def _figures(found: "Provenance") -> str:
    after, before = found.figures.get("after"), found.figures.get("before")
    if after is None:
        return ""
    earlier = f" (before {float(before['loss']):.3f})" if before is not None else ""
    return (
        f"loss {float(after['loss']):.3f}{earlier}, perplexity {units.perplexity(float(after['perplexity']))}"
    )
