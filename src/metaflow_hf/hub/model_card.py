"""The README of a pushed model: what it is, what it was trained on, from which commits, and how well it does."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

_REPO: Final = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True, kw_only=True)
class Result:
    """One figure: the metric's name on the hub (``perplexity``, ``loss``, …), its value, and the text it is of."""

    metric: str
    value: float
    dataset: str
    before: float | None = None


@dataclass(frozen=True, kw_only=True)
class TrainedDataset:
    """One dataset of a mixture: its name, where it is from, what was trained of it, and its held-out losses."""

    name: str
    dataset: str
    share: float
    tokens: int
    loss_before: float | None = None
    loss_after: float | None = None


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a model card says. Empty values are left out.

    ``datasets`` are those of a mixture, instead of ``dataset``. ``base_model`` and ``dataset`` are ids of the hub where they have one (``dataset`` also ``hf://…``); ``rows`` are
    label and value of the training; ``hyperparameters`` are nested; ``samples`` are (prompt, text); ``plot`` is the name
    of a picture in the repository.
    """

    name: str
    base_model: str = ""
    base_commit: str = ""
    dataset: str = ""
    dataset_commit: str = ""
    datasets: Sequence[TrainedDataset] = ()
    rows: Sequence[tuple[str, str]] = ()
    results: Sequence[Result] = ()
    hyperparameters: Mapping[str, Any] | None = None
    samples: Sequence[tuple[str, str]] = ()
    plot: str = ""
    is_adapter: bool = False


def model_card(facts: CardFacts) -> str:
    """The README.md, with the header that the hub reads. Text of others is shown as it is, never as markup."""
    from huggingface_hub import EvalResult, ModelCardData

    header = ModelCardData(
        model_name=facts.name,
        base_model=facts.base_model if _REPO.fullmatch(facts.base_model) else None,
        datasets=_dataset_ids(facts) or None,
        library_name="peft" if facts.is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["metaflow-hf"],
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type=_dataset_id(result.dataset) or "text",
                dataset_name=result.dataset or "held-out text",
                metric_type=result.metric,
                metric_value=round(result.value, 4),
            )
            for result in facts.results
        ]
        or None,
    )
    parts = (
        f"---\n{header.to_yaml()}\n---\n",
        f"# {_plain(facts.name)}\n",
        _origin(facts),
        _usage(facts),
        _results(facts.results),
        _datasets(facts.datasets),
        f"## Training loss\n\n![Training loss]({facts.plot})\n" if facts.plot else "",
        _rows("Training", [*facts.rows, *_commits(facts)]),
        _samples(facts.samples),
        _hyperparameters(facts.hyperparameters),
    )
    return "\n".join(part for part in parts if part)


def _origin(facts: CardFacts) -> str:
    base = f" from {_linked(facts.base_model, '')}" if facts.base_model else ""
    dataset = _dataset_id(facts.dataset)
    data = (
        f" on {_linked(dataset, 'datasets/') if dataset else _code(facts.dataset)}" if facts.dataset else ""
    )
    kind = "An adapter" if facts.is_adapter else "A language model"
    return f"{kind}, trained{base}{data} with [Metaflow](https://metaflow.org) and metaflow-hf.\n"


def _usage(facts: CardFacts) -> str:
    repo = json.dumps(facts.name)
    loader = (
        "peft import AutoPeftModelForCausalLM"
        if facts.is_adapter
        else "transformers import AutoModelForCausalLM"
    )
    cls = loader.rpartition(" ")[2]
    lines = (
        f"from {loader}",
        "from transformers import AutoTokenizer",
        "",
        f"model = {cls}.from_pretrained({repo})",
        f"tokenizer = AutoTokenizer.from_pretrained({repo})",
    )
    return "\n".join(("```python", *lines, "```\n"))


def _results(results: Sequence[Result]) -> str:
    if not results:
        return ""
    lines = ["## Results", "", "| metric | text | before training | after training |", "|---|---|---:|---:|"]
    lines += [
        f"| {_plain(item.metric)} | {_code(item.dataset or 'held-out text')} | "
        f"{'' if item.before is None else f'{item.before:,.4g}'} | **{item.value:,.4g}** |"
        for item in results
    ]
    return "\n".join([*lines, ""])


def _datasets(datasets: Sequence[TrainedDataset]) -> str:
    if not datasets:
        return ""
    lines = [
        "## Datasets",
        "",
        "Shares of all samples, tokens with loss, and the loss of held-out text in nats per token.",
        "",
        "| dataset | from | share | tokens | loss before | loss after |",
        "|---|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {_plain(one.name)} | {_source(one.dataset)} | {100 * one.share:.1f} % | {one.tokens:,} | "
        f"{_loss(one.loss_before)} | {_loss(one.loss_after)} |"
        for one in datasets
    ]
    return "\n".join([*lines, ""])


def _source(dataset: str) -> str:
    name = _dataset_id(dataset)
    return _linked(name, "datasets/") if name else _code(dataset)


def _loss(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.4g}"


def _commits(facts: CardFacts) -> list[tuple[str, str]]:
    rows = [("base model's commit", facts.base_commit), ("dataset's commit", facts.dataset_commit)]
    return [row for row in rows if row[1]]


def _rows(title: str, rows: Sequence[tuple[str, str]]) -> str:
    if not rows:
        return ""
    lines = [f"## {title}", "", "| | |", "|---|---|"]
    return "\n".join([*lines, *(f"| {_plain(label)} | {_code(value)} |" for label, value in rows), ""])


def _samples(samples: Sequence[tuple[str, str]]) -> str:
    if not samples:
        return ""
    shown = [_fenced(f"{prompt}⟶{text}") for prompt, text in samples]
    return "\n".join(["## Samples", "", "The prompt, an arrow, and what the model wrote.", "", *shown])


def _hyperparameters(values: Mapping[str, Any] | None) -> str:
    if not values:
        return ""
    import yaml

    text = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)
    return "\n".join(["## Hyperparameters", "", _fenced(text.rstrip(), "yaml")])


def _dataset_id(dataset: str) -> str:
    """``owner/name`` of ``hf://owner/name:config@revision``; "" for what is not on the hub."""
    name = dataset.removeprefix("hf://").partition("@")[0].partition(":")[0]
    return name if dataset.startswith("hf://") and _REPO.fullmatch(name) else ""


def _dataset_ids(facts: CardFacts) -> list[str]:
    """The datasets on the hub, each once."""
    sources = [facts.dataset, *(one.dataset for one in facts.datasets)]
    return list(dict.fromkeys(name for source in sources if (name := _dataset_id(source))))


def _linked(repo_id: str, folder: str) -> str:
    if not _REPO.fullmatch(repo_id):
        return _code(repo_id)
    return f"[{repo_id}](https://huggingface.co/{folder}{repo_id})"


def _plain(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>#|!])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    """One line as code; in a table too."""
    inside = " ".join(text.split()).replace("|", "\\|")
    fence = "`" * (max((len(run) for run in re.findall(r"`+", inside)), default=0) + 1)
    space = " " if inside.startswith("`") or inside.endswith("`") else ""
    return f"{fence}{space}{inside}{space}{fence}"


def _fenced(text: str, language: str = "text") -> str:
    fence = "`" * max(3, max((len(run) for run in re.findall(r"`+", text)), default=0) + 1)
    return f"{fence}{language}\n{text}\n{fence}\n"
