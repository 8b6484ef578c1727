"""From a final lineage to a model that anybody can load."""

import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from metaflow_hf.config import TrainConfig
from metaflow_hf.data.mixed_order import MixedOrder
from metaflow_hf.data.order import Order
from metaflow_hf.errors import ConfigError, NotFound, TrainingIncomplete
from metaflow_hf.references import ModelRef
from metaflow_hf.store.models import save_directory
from metaflow_hf.store.objects import ObjectStore, encode_json
from metaflow_hf.train.adapters import merge_adapters, save_adapters
from metaflow_hf.train.encoding import trained_end_tokens, training_tokenizer
from metaflow_hf.train.files import PayloadFiles
from metaflow_hf.train.lineage import ClosedRound, Lineage
from metaflow_hf.train.mixtures import trained_datasets
from metaflow_hf.train.models import (
    cast,
    export_dtype,
    load_parts,
    load_weights,
    prepare,
    save_model,
    trained_parameters,
)
from metaflow_hf.train.outcome_check import check_trained
from metaflow_hf.train.ranges import Positions
from metaflow_hf.train.records import Payload
from metaflow_hf.train.special_tokens import align_special_tokens
from metaflow_hf.train.tensors import TensorReader
from metaflow_hf.train.text_part import copy_processor
from metaflow_hf.train.validation import ranked

logger = logging.getLogger("metaflow_hf.train")

# Where a lineage records what its weights were exported as.
_FOLDERS: Final = {"last": "exports", "best": "best", "ema": "averaged"}


def export_lineage(
    *,
    store: ObjectStore,
    models: ObjectStore,
    model_dir: Path,
    config: TrainConfig,
    flow: str,
    run: str,
    step: str,
    task: str,
    label: str = "model",
    best: bool = False,
    ema: bool = False,
    base_model: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    pathspec: str = "",
    order: Order | None = None,
) -> ModelRef:
    """Saves the final model of a lineage with its tokenizer, once: later calls return the same reference, for as long
    as the model is stored; a deleted one is exported again while the lineage's weights are there.

    ``store`` is rooted at ``training/<lineage>/``; ``models`` at the root that references are loaded from. The
    weights are copied, so the reference outlives the lineage. Adapters are folded into the model, or are what is saved
    (``model.lora.save``). With ``best`` it is the round with the lowest held-out loss of those that were measured while
    training went on, which may be the last as well; with ``ema`` it is the moving average of all rounds
    (``rounds.ema_half_life``), not both at once. Either is to be asked for first, because a collection may free its weights once the last is
    exported. ``metadata`` is added to what the lineage says about itself; ``base_model`` is the reference of
    ``model_dir``, ``order`` that of the lineage: with it the metadata says what was trained of each dataset of a
    mixture. Raises ``TrainingIncomplete`` when the newest round is not final or trained nothing,
    ``NotFound`` when model and weights are both gone.
    """
    if best and ema:
        raise ValueError("the best round and the moving average are two models: ask for one at a time.")
    lineage = Lineage(store)
    newest = _final(lineage)
    closed = (best and _best(lineage, newest)) or newest
    weights = _average(newest, config) if ema else closed.manifest.weights
    kind = "ema" if ema else "last" if closed is newest else "best"
    exports = _Exports(
        lineage,
        models,
        f"adapter-{weights.digest}" if _saves_adapter(config) else weights.digest,
        folder=_FOLDERS[kind],
    )
    reference = exports.usable()
    if reference is not None:
        return reference
    try:
        with tempfile.TemporaryDirectory(prefix="export-") as scratch:
            directory = Path(scratch) / "model"
            write_model(
                lineage,
                weights,
                model_dir,
                config,
                directory,
                base_model=base_model,
            )
            reference = save_directory(
                models,
                directory,
                flow=flow,
                run=run,
                step=step,
                task=task,
                label=label if kind == "last" else f"{label}-{kind}",
                metadata={
                    **_facts(lineage, closed),
                    **_datasets(lineage, closed, order),
                    **({} if ema else _measured(lineage, closed)),
                    **_adapter_facts(config, base_model or {}),
                    **(metadata or {}),
                },
                pathspec=pathspec,
            )
    except NotFound as error:
        # Once a lineage is exported its weights may be collected at any moment, by then with the record in place.
        exported = exports.usable()
        if exported is not None:
            return exported
        raise NotFound(
            f"the lineage {lineage.spec().lineage!r} cannot be exported: {error} Its model was deleted after an earlier "
            "export, or nobody trained for 30 days, and `metaflow hf gc` has freed its weights since. Train under "
            "another lineage; rounds.keep: all keeps the weights of the next one."
        ) from error
    return exports.record(reference)


class _Exports:
    """The records of what one round was exported as, oldest first; all but the last were deleted models.

    ``name`` is the digest of the round's weights, and the kind of export where there are several.
    """

    def __init__(self, lineage: Lineage, models: ObjectStore, name: str, *, folder: str = "exports") -> None:
        self._store = lineage.store
        self._models = models
        self._name = name
        self._folder = folder

    def usable(self) -> ModelRef | None:
        """The reference of the newest record, if the model is still stored."""
        return self._newest(self._records())

    def record(self, reference: ModelRef) -> ModelRef:
        """Records an export, or returns the one that another process recorded first."""
        while True:
            records = self._records()
            known = self._newest(records)
            if known is not None:
                return known
            # Of all who saw these records, one creates the next.
            suffix = f".{len(records)}" if records else ""
            self._store.create(f"{self._folder}/{self._name}{suffix}.json", encode_json(reference.to_json()))

    def _newest(self, records: list[str]) -> ModelRef | None:
        if not records:
            return None
        reference = ModelRef.from_json(json.loads(self._store.get(records[-1])))
        return reference if self._is_stored(reference) else None

    def _records(self) -> list[str]:
        keys = [info.key for info in self._store.list(self._folder)]
        keys = [key for key in keys if key.startswith(f"{self._folder}/{self._name}.")]
        return sorted(keys, key=lambda key: (len(key), key))

    def _is_stored(self, reference: ModelRef) -> bool:
        try:
            self._models.head(reference.key)
        except NotFound:
            return False
        return True


def write_model(
    lineage: Lineage,
    weights: Payload,
    model_dir: Path,
    config: TrainConfig,
    directory: Path,
    *,
    base_model: Mapping[str, Any] | None = None,
) -> None:
    """Writes the model with these weights of a closed round, with its tokenizer, as a directory that transformers loads, or peft where
    adapters are to be saved by themselves.
    """
    seed = config.data.seed
    loaded = load_parts(model_dir, config.model, seed=seed)
    model = prepare(loaded.language, config.model, seed=seed)
    tokenizer = training_tokenizer(model_dir, config)
    with tempfile.TemporaryDirectory(prefix="weights-") as scratch:
        files = PayloadFiles(lineage.store, Path(scratch))
        with TensorReader(files.fetch(weights)) as reader:
            load_weights(trained_parameters(model), reader)
    if _saves_adapter(config):
        commit = (base_model or {}).get("commit_hash")
        save_adapters(model, directory, base_model=config.model.name, revision=commit)
    else:
        merged = merge_adapters(model)
        # Trained weights are the same in a language model and in the multimodal model around it.
        whole = merged if loaded.whole is loaded.language else loaded.whole
        align_special_tokens(whole, tokenizer, end_token_ids=trained_end_tokens(tokenizer, lineage.spec()))
        save_model(cast(whole, export_dtype(model_dir, config.model)), directory)
        if whole is not merged:
            copy_processor(model_dir, directory)
    tokenizer.save_pretrained(directory)


def _saves_adapter(config: TrainConfig) -> bool:
    return config.model.lora is not None and config.model.lora.save == "adapter"


def _adapter_facts(config: TrainConfig, base_model: Mapping[str, Any]) -> dict[str, Any]:
    """What has to be loaded before adapters can be."""
    return {"adapter_of": base_model.get("key", "")} if _saves_adapter(config) else {}


def _final(lineage: Lineage) -> ClosedRound:
    spec = lineage.spec()
    newest = lineage.newest()
    if newest is None or not newest.manifest.final:
        settled = len(newest.manifest.settled) if newest else 0
        raise TrainingIncomplete(
            f"the lineage {spec.lineage!r} is not final: {settled} of {spec.num_positions} positions are done. Let a "
            "worker finish it: retry or resume the run, or run again with the same lineage."
        )
    check_trained(spec, newest)
    return newest


def _average(newest: ClosedRound, config: TrainConfig) -> Payload:
    """The moving average of all rounds; where none of them trained anything, the weights that they began with."""
    if newest.manifest.ema is not None:
        return newest.manifest.ema
    if config.rounds.ema_half_life is None:
        raise ConfigError(
            "evaluation.model: ema, but this training kept no moving average: rounds.ema_half_life was not set."
        )
    return newest.manifest.weights


def _best(lineage: Lineage, newest: ClosedRound) -> ClosedRound | None:
    """The best measured round whose weights are stored, or were exported; ``None`` when that is the newest."""
    exported = [info.key for info in lineage.store.list("best")]
    for _, found in ranked(lineage.validations()):
        if found.weights == newest.manifest.weights:
            return None
        is_exported = any(found.weights.digest in key for key in exported)
        if is_exported or list(lineage.store.list(found.weights.key.rpartition("/")[0])):
            return lineage.round(found.round)
    return None


def _facts(lineage: Lineage, newest: ClosedRound) -> dict[str, Any]:
    manifest = newest.manifest
    skipped = Positions.from_ranges(manifest.skipped)
    return {
        "lineage": lineage.spec().lineage,
        "rounds": newest.number,
        "tokens": manifest.tokens,
        "positions_done": len(manifest.settled - skipped),
        "positions_skipped": len(skipped),
    }


def _datasets(lineage: Lineage, closed: ClosedRound, order: Order | None) -> dict[str, Any]:
    """What was trained of each dataset of a mixture."""
    return {"datasets": trained_datasets(lineage, closed, order)} if isinstance(order, MixedOrder) else {}


def _measured(lineage: Lineage, closed: ClosedRound) -> dict[str, Any]:
    """The held-out loss of a round that was measured while training went on."""
    found = [item for item in lineage.validations() if item.round == closed.number]
    return {"held_out_loss": found[0].loss} if found and found[0].loss is not None else {}
