"""A trained model onto the hub: its files, and a model card that says where it is from and how good it is."""

import logging
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from metaflow_hf.errors import ConfigError, NotFound
from metaflow_hf.hub import push
from metaflow_hf.hub.loading import load_reference
from metaflow_hf.hub.model_card import CardFacts, Result, TrainedDataset, model_card
from metaflow_hf.report import charts, units
from metaflow_hf.report.plot import svg
from metaflow_hf.report.series import StepPoint
from metaflow_hf.store import ObjectStore, quote_part
from metaflow_hf.train.lineage import Lineage
from metaflow_hf.train.results import ALL_WORKERS, StoredResults, count_in, find_results

logger = logging.getLogger("metaflow_hf.train")

README: Final = "README.md"
PLOT: Final = "training_loss.svg"


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """What was pushed, or would be: files with their bytes, the card, and where it went ("" for a dry run)."""

    repo_id: str
    files: tuple[tuple[str, int], ...]
    card: str
    commit_hash: str = ""
    url: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def publish(
    store: ObjectStore,
    reference: Mapping[str, Any],
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
    endpoint: str | None = None,
    token: bool | str | None = None,
    dry_run: bool = False,
) -> Publication:
    """Pushes a model of the datastore ``store`` with its card in one commit; makes the repository if it is missing.

    The card is written from what the lineage and its results say; a README.md that the model brought along stays. The
    plot needs the extra ``publish``, and is left out without it. ``dry_run`` asks the hub nothing. Raises ``NotFound``
    for a model that is stored no more, and as ``hub.push`` does.
    """
    directory = load_reference(reference)
    try:
        card = write_card(store, reference, repo_id, directory)
        files = tuple(
            (str(path.relative_to(directory)), path.stat().st_size)
            for path in sorted(directory.rglob("*"))
            if path.is_file()
        )
        if dry_run:
            return Publication(repo_id=repo_id, files=files, card=card)
        info = push(
            directory,
            repo_id,
            revision=revision,
            private=private,
            commit_message=commit_message,
            endpoint=endpoint,
            token=token,
        )
        return Publication(
            repo_id=repo_id, files=files, card=card, commit_hash=info.oid, url=str(info.commit_url)
        )
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def write_card(store: ObjectStore, reference: Mapping[str, Any], repo_id: str, directory: Path) -> str:
    """Writes README.md and the plot into the model's directory, unless it has a README.md; returns its text."""
    path = directory / README
    if path.exists():
        return path.read_text("utf-8", "replace")
    results = find_results(store, reference)
    picture = plot(results) if results is not None else ""
    if picture:
        (directory / PLOT).write_text(picture, "utf-8")
    card = model_card(card_facts(store, reference, repo_id, results, plot=PLOT if picture else ""))
    path.write_text(card, "utf-8")
    return card


def plot(results: StoredResults) -> str:
    """The losses over the tokens of the run as SVG; "" without any, or without the package that draws."""
    points = [StepPoint(ALL_WORKERS, tokens, loss, 0.0) for tokens, loss in results.training_loss]
    after = results.figures.get("after")
    chart = charts.loss_chart(
        points, [ALL_WORKERS], [], {"held-out text, after training": float(after["loss"])} if after else {}
    )
    if chart is None:
        return ""
    try:
        return svg(chart)
    except ConfigError as error:
        logger.warning("the model card has no plot: %s", error)
        return ""


def card_facts(
    store: ObjectStore,
    reference: Mapping[str, Any],
    repo_id: str,
    results: StoredResults | None,
    *,
    plot: str = "",
) -> CardFacts:
    """What is known of a model: by its metadata, its lineage where that is stored, and the results of its run."""
    metadata: Mapping[str, Any] = reference.get("metadata", {})
    spec = _spec(store, str(metadata.get("lineage", "")))
    sources = dict(spec.sources) if spec is not None else {}
    seconds = [("time", units.duration(results.seconds))] if results is not None and results.seconds else []
    rows = [
        ("lineage", str(metadata.get("lineage", ""))),
        ("run", results.run if results is not None else str(reference.get("pathspec", ""))),
        ("tokens", units.count(count_in(metadata, "tokens"))),
        ("rounds", units.count(count_in(metadata, "rounds"))),
        *seconds,
        ("model's digest", str(reference.get("digest", ""))),
    ]
    return CardFacts(
        name=repo_id,
        base_model=str(sources.get("model") or metadata.get("base_model") or ""),
        base_commit=sources.get("model_commit", ""),
        dataset=str(sources.get("dataset") or metadata.get("dataset") or ""),
        datasets=_datasets(metadata, results),
        dataset_commit=sources.get("dataset_commit", ""),
        rows=[row for row in rows if row[1] and row[1] != "0"],
        results=_results(results, str(metadata.get("dataset") or "")),
        hyperparameters=_readable(spec.hyperparameters) if spec is not None else None,
        samples=[(item["prompt"], item["text"]) for item in results.samples if item["name"] == "after"]
        if results is not None
        else (),
        plot=plot,
        is_adapter="adapter_of" in metadata,
    )


def _datasets(metadata: Mapping[str, Any], results: StoredResults | None) -> list[TrainedDataset]:
    """The datasets of a mixture, with the losses of the run where these are kept."""
    losses = {one["name"]: one for one in results.datasets} if results is not None else {}
    return [
        TrainedDataset(
            name=str(one["name"]),
            dataset=str(one["dataset"]),
            share=_number(one["share"]) or 0.0,
            tokens=count_in(one, "tokens"),
            loss_before=_number(losses.get(one["name"], {}).get("loss_before")),
            loss_after=_number(losses.get(one["name"], {}).get("loss_after")),
        )
        # Users write metadata too.
        for one in metadata.get("datasets", ())
        if isinstance(one, Mapping) and {"name", "dataset", "share", "tokens"} <= one.keys()
    ]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def _spec(store: ObjectStore, lineage: str) -> Any:
    if not lineage:
        return None
    place = store.child(f"training/{quote_part(lineage)}")
    try:
        place.head("spec.json")
    except NotFound:
        return None
    return Lineage(place).spec()


def _results(results: StoredResults | None, dataset: str) -> list[Result]:
    if results is None or "after" not in results.figures:
        return []
    after, before = results.figures["after"], results.figures.get("before", {})
    return [
        Result(
            metric=metric,
            value=float(after[metric]),
            before=float(before[metric]) if metric in before else None,
            dataset=dataset,
        )
        for metric in ("loss", "perplexity", "bits_per_byte")
        # The hub takes no other numbers.
        if math.isfinite(float(after[metric]))
    ]


def _readable(values: Mapping[str, Any]) -> dict[str, Any]:
    """Hyperparameters without what only a program reads."""
    hidden = ("architecture", "tokenizer", "base")
    return {
        section: {
            k: v for k, v in settings.items() if v is not None and not (section == "model" and k in hidden)
        }
        if isinstance(settings, Mapping)
        else settings
        for section, settings in values.items()
    }
