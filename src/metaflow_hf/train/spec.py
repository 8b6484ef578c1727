"""`spec.json`: what a lineage trains, and the digest of everything that changes the mathematics.

Whoever joins a lineage must agree on that; how many workers there are, how long rounds take, what is reported
and kept may differ.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

from metaflow_hf.config import TrainConfig
from metaflow_hf.data.formats import DetectedFormat
from metaflow_hf.data.mixture import MixedFormat
from metaflow_hf.data.order import ClaimOrder, Order
from metaflow_hf.errors import ConfigError, LineageMismatch
from metaflow_hf.store.objects import encode_json
from metaflow_hf.train.heldout import training_samples
from metaflow_hf.train.mixtures import mixed_order
from metaflow_hf.train.records import Payload, Spec, digest_of, flatten

CLAIMS_PER_WORKER: Final = 160
# Fewer than so many for each worker are not worth a full step.
FEWEST_CLAIMS: Final = 4
FULL: Final = 0.9
# What transformers notes about itself in a config.json; it does not change the model.
_TOKENIZER_FILES: Final = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "chat_template*",
    "*.model",
)
_WEIGHT_FILES: Final = ("*.safetensors", "*.bin")
_SAMPLE_BYTES: Final = 2**20
_BOOKKEEPING: Final = ("_name_or_path", "transformers_version", "_commit_hash")


class BlocksManifest(Protocol):
    """What is read of a dataset's manifest."""

    @property
    def dataset_name(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def is_complete(self) -> bool: ...
    @property
    def blocks(self) -> Sequence[Any]: ...


def claim_samples(
    config: TrainConfig, chunk_size: int, num_samples: int, *, step_rows: int = 1, epochs: int | None = None
) -> int:
    """Rows per claim: what the configuration says, or for ``auto`` as many as leave each worker enough claims.

    ``num_samples`` are those of one of ``epochs`` (default ``data.epochs``).

    Enough are four claims in each of 40 rounds, so that a claim is at most a quarter of a round. A step ends with its
    claim, so with ``auto`` a claim is as many rows as fill one or several steps, of about ``step_rows`` rows each, where
    that leaves each worker a few claims. Divides ``chunk_size``.
    """
    wanted = config.rounds.claim_samples
    if wanted == "auto":
        share = num_samples * (epochs or config.data.epochs) // config.rounds.workers
        fine, sizes = max(share // CLAIMS_PER_WORKER, 1), _divisors(chunk_size)
        finest = max(size for size in sizes if size <= fine)
        candidates = [size for size in sizes if finest <= size <= max(share // FEWEST_CLAIMS, finest)]
        filling = [size for size in candidates if _filled(size, step_rows) >= FULL]
        return min(filling, default=max(candidates, key=lambda size: _filled(size, step_rows)))
    if chunk_size % wanted:
        near = min(_divisors(chunk_size), key=lambda size: abs(size - wanted))
        raise ConfigError(
            f"rounds.claim_samples = {wanted} does not divide data.dataset_chunk_size = {chunk_size}; the nearest "
            f"that does is {near}."
        )
    return wanted


def _filled(rows: int, step_rows: int) -> float:
    """How full the steps of a claim are on average, where some claims are a little longer than others."""
    steps = rows / step_rows
    return steps / math.ceil(steps * 1.03)


def make_spec(
    config: TrainConfig,
    *,
    lineage: str,
    manifest: BlocksManifest,
    chunk_size: int,
    model_dir: Path,
    initial_weights: Payload,
    evaluation_rows: str | None = None,
    form: DetectedFormat | None = None,
    step_rows: int = 1,
    datasets: Sequence[Mapping[str, Any]] = (),
) -> Spec:
    """The specification of a new lineage.

    ``form`` is the format of the rows, ``step_rows`` about how many of them fill an optimizer step; ``evaluation_rows`` says which texts are not trained because an evaluation dataset holds them (``HeldOut.digest``). ``datasets`` describe those of a mixture (``describe_parts``).
    Raises ``ConfigError`` for an incomplete or too small dataset.
    """
    if not manifest.is_complete:
        raise ConfigError(
            f"the dataset {manifest.dataset_name!r} is still being built: training by rounds needs all of it."
        )
    samples = training_samples([block.sample_count for block in manifest.blocks], config)
    order = describe_order(
        config,
        chunk_size,
        samples=sum(samples),
        block_samples=samples,
        step_rows=step_rows,
        datasets=datasets,
    )
    values = hyperparameters(config, model_dir, evaluation_rows, form)
    dataset = {"key": manifest.dataset_name, "digest": manifest.digest}
    return Spec(
        lineage=lineage,
        dataset=dataset,
        order=order,
        num_positions=order_of(order, samples).num_positions,
        max_tokens=config.rounds.max_tokens,
        hyperparameters=values,
        config_digest=digest_of(encode_json(_mathematics(dataset, order, values, config.rounds.max_tokens))),
        initial_weights=initial_weights,
    )


def describe_order(
    config: TrainConfig,
    chunk_size: int,
    *,
    samples: int,
    block_samples: Sequence[int] = (),
    step_rows: int = 1,
    datasets: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """The order of claims as a specification describes it.

    Args:
        config: The configuration.
        chunk_size: Samples of a chunk.
        samples: Samples of one epoch of a single dataset.
        block_samples: Samples of each block. Without them the rows of a mixture are not rounded to whole claims.
        step_rows: About how many rows fill an optimizer step.
        datasets: The datasets of a mixture, as ``describe_parts`` gives them. A mixture is one epoch.

    """
    epochs = config.data.epochs
    if datasets:
        samples, epochs = sum(one["rows"] for one in datasets), 1
    order: dict[str, Any] = {
        "seed": config.data.seed,
        "shuffle": config.data.shuffle,
        "epochs": epochs,
        "chunk_samples": chunk_size,
        "claim_samples": claim_samples(config, chunk_size, samples, step_rows=step_rows, epochs=epochs),
        "num_samples": samples,
    }
    if not datasets:
        return order
    order["datasets"] = [dict(one) for one in datasets]
    if block_samples:
        rows = mixed_order(order, block_samples).samples
        order["datasets"] = [{**one, "rows": count} for one, count in zip(datasets, rows, strict=True)]
        order["num_samples"] = sum(rows)
    return order


def order_of(order: Mapping[str, Any], samples: Sequence[int]) -> Order:
    """The order of claims that a specification describes; ``samples`` are those trained of each block."""
    if "datasets" in order:
        return mixed_order(order, samples)
    return ClaimOrder(
        samples,
        order["chunk_samples"],
        order["claim_samples"],
        seed=order["seed"],
        epochs=order["epochs"],
        shuffle=order["shuffle"],
    )


def hyperparameters(
    config: TrainConfig,
    model_dir: Path,
    evaluation_rows: str | None = None,
    form: DetectedFormat | None = None,
) -> dict[str, Any]:
    """Everything in a configuration that changes the mathematics, and the architecture in ``model_dir``."""
    return {
        "model": {
            "repo_id": config.model.repo_id,
            "architecture": architecture_digest(model_dir),
            "tokenizer": tokenizer_digest(model_dir),
            # Adapters are trained on weights that are in no round, and a reference may come to mean another model.
            "base": weights_digest(model_dir) if config.model.lora or config.model.reference else None,
            "dtype": config.model.dtype,
            "changes": config.model.architecture,
            "initialise": config.model.initialise,
            "lora": config.model.lora and config.model.lora.model_dump(mode="json", exclude={"save"}),
        },
        "data": {
            "sequence_length": config.data.sequence_length,
            "batch_size": config.data.batch_size,
            "packing": config.data.packing,
            "long_documents": config.data.long_documents,
            "loss_on": config.data.loss_on,
            "text_column": config.data.text_column,
            **_format(config, form),
            "heldout_samples": None if config.data.evaluation_dataset else config.data.heldout_samples,
            "evaluation_rows": evaluation_rows,
        },
        "rollout": {
            "use_chunked_training": config.rollout.use_chunked_training,
            "gradient": config.rollout.gradient,
            # Exact gradients do not depend on where a sequence is cut; truncated ones do.
            "chunk_size": config.rollout.chunk_size if config.rollout.gradient == "truncated" else None,
        },
        "optimizer": config.optimizer.model_dump(mode="json", exclude={"on_non_finite"}),
        "rounds": config.rounds.model_dump(
            mode="json",
            include={
                "merge",
                "outer_learning_rate",
                "outer_momentum",
                "encoding",
                "solo_start",
                "ema_half_life",
            },
        ),
    }


def _format(config: TrainConfig, form: DetectedFormat | None) -> dict[str, Any]:
    """How rows are read and rendered, where that is not as plain text."""
    data = config.data
    if isinstance(form, MixedFormat):
        parts = [{"format": one.name, "columns": dict(one.columns)} for one in form.parts]
        return {"datasets": parts, **_format(config, None)}
    template = data.chat_template and digest_of(data.chat_template.encode())
    is_plain = form is None or form.name == "text"
    values = {
        "format": None if is_plain or form is None else form.name,
        "columns": None if is_plain or form is None else dict(form.columns),
        "chat_template": template,
        "template_date": data.template_date,
    }
    return {name: value for name, value in values.items() if value}


def tokenizer_digest(model_dir: Path) -> str:
    """The digest of the files that decide how text becomes tokens."""
    names = sorted({path for pattern in _TOKENIZER_FILES for path in model_dir.glob(pattern)})
    return digest_of(encode_json({path.name: digest_of(path.read_bytes()) for path in names}))


def weights_digest(model_dir: Path) -> str:
    """A digest of the weights' files by size and by their first and last MiB; cheap, and other weights differ in it."""
    facts = {}
    for path in sorted(path for pattern in _WEIGHT_FILES for path in model_dir.glob(pattern)):
        with path.open("rb") as file:
            head = file.read(_SAMPLE_BYTES)
            file.seek(max(path.stat().st_size - _SAMPLE_BYTES, 0))
            facts[path.name] = [path.stat().st_size, digest_of(head), digest_of(file.read())]
    return digest_of(encode_json(facts))


def architecture_digest(model_dir: Path) -> str:
    """The digest of a model's ``config.json`` without what transformers notes about itself."""
    values = json.loads((model_dir / "config.json").read_text("utf-8"))
    return digest_of(encode_json({key: value for key, value in values.items() if key not in _BOOKKEEPING}))


def check_same(theirs: Spec, ours: Spec) -> None:
    """Raises ``LineageMismatch`` listing every difference that changes the mathematics."""
    if theirs.config_digest == ours.config_digest:
        return
    before, after = (
        flatten(_mathematics(spec.dataset, spec.order, spec.hyperparameters, spec.max_tokens))
        for spec in (theirs, ours)
    )
    lines = [
        f"  {path}: {before.get(path)!r} in the lineage, {after.get(path)!r} here"
        for path in sorted(before.keys() | after.keys())
        if before.get(path) != after.get(path)
    ]
    raise LineageMismatch(
        f"the lineage {theirs.lineage!r} was started with another configuration:\n"
        + "\n".join(lines)
        + "\nUse the lineage's values, or start another lineage."
    )


def _mathematics(
    dataset: Mapping[str, str], order: Mapping[str, Any], values: Mapping[str, Any], max_tokens: int | None
) -> dict[str, Any]:
    # The key of a dataset is a name; its digest is what is trained.
    return {
        "dataset": {"digest": dataset["digest"]},
        "order": dict(order),
        "rounds": {**values["rounds"], "max_tokens": max_tokens},
        **{key: value for key, value in values.items() if key != "rounds"},
    }


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
