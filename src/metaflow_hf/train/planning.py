"""What a run is going to do, told before its first step."""

import contextlib
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, Self

import torch
import yaml

from metaflow_hf.config import TrainConfig
from metaflow_hf.data.mixture import MixedBlocks, ReadableBlocks
from metaflow_hf.data.order import Order
from metaflow_hf.errors import ConfigError
from metaflow_hf.report.outcome import Plan
from metaflow_hf.train.architecture import read_architecture
from metaflow_hf.train.encoding import example_encoder, row_format, training_tokenizer
from metaflow_hf.train.evaluation import passages
from metaflow_hf.train.footprint import disk_of_run, memory_of_worker
from metaflow_hf.train.heldout import NO_COPIES, Copies, held_out, measured_rows, training_samples
from metaflow_hf.train.mixture_plan import ends_with, heldout_rows_of, plan_datasets, survey_mixture
from metaflow_hf.train.models import (
    compute_dtype,
    declared_positions,
    export_dtype,
    load_model,
    prepare,
)
from metaflow_hf.train.records import Spec
from metaflow_hf.train.spec import order_of
from metaflow_hf.train.speed import tokens_per_second
from metaflow_hf.train.survey import Survey, Surveyor

logger = logging.getLogger("metaflow_hf.train")

FEW_ROUNDS: Final = 40
# Steps that hold less than this share of the configured batch are worth a word.
SMALL_BATCH: Final = 0.75


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """How much there is: ``samples`` an epoch, held-out ones included, in ``num_positions`` claims over all.

    ``order`` is that of a specification: seed, epochs, and samples of a chunk and of a claim.
    """

    lineage: str
    samples: int
    order: Mapping[str, Any]
    num_positions: int
    max_tokens: int | None

    @property
    def claim_samples(self) -> int:
        """Rows of a claim."""
        return int(self.order["claim_samples"])

    @classmethod
    def of(cls, spec: Spec) -> Self:
        """That of a started lineage."""
        return cls(
            lineage=spec.lineage,
            samples=int(spec.order["num_samples"]),
            order=spec.order,
            num_positions=spec.num_positions,
            max_tokens=spec.max_tokens,
        )


def make_plan(
    extent: Extent,
    training: ReadableBlocks,
    heldout: ReadableBlocks | None,
    *,
    model_dir: Path,
    config: TrainConfig,
    base_model: Mapping[str, Any],
    speed: float | None = None,
    copies: Copies = NO_COPIES,
    found: Survey | None = None,
) -> Plan:
    """The plan of a run. Small datasets are counted as a whole, of larger ones some claims are prepared.

    ``copies`` are those of the evaluation dataset (``count_copies``), ``found`` is what ``look`` found already. ``speed`` is that of one worker in tokens a second, which is otherwise measured on this machine where that is cheap.
    """
    parameters, trained = _count_parameters(model_dir, config)
    found = found or look(extent, training, heldout, model_dir=model_dir, config=config)
    rows = extent.samples
    samples = found.scaled(found.trained, rows)
    per_sample = found.tokens_per_row
    available = found.scaled(found.tokens, rows) * extent.order["epochs"]
    tokens = min(available, extent.max_tokens or available)
    per_claim = per_sample * extent.claim_samples * samples / rows
    per_step = config.data.batch_size * config.data.sequence_length
    per_step *= config.optimizer.gradient_accumulation_steps
    workers = config.rounds.workers
    speed = speed or tokens_per_second(model_dir, config, parameters=parameters)
    # Of the rows looked at, all may be longer than what is trained.
    in_claims = tokens / per_claim if per_claim else 0.0
    rounds = 0 if speed is None or not per_claim else _rounds(tokens, per_claim, speed, config)
    claims = min(extent.num_positions, math.ceil(extent.num_positions * tokens / available))
    manifest, form = training.manifest, row_format(training, config)
    memory = memory_of_worker(model_dir, config, _likely_dtype(config))
    return Plan(
        base_model=config.model.name,
        model_commit=str(base_model.get("commit_hash", "")),
        dataset=config.data.title,
        dataset_commit=manifest.commit_hash or "",
        parameters=parameters,
        trainable_parameters=trained,
        samples=samples,
        heldout_samples=min(
            heldout.manifest.total_samples if heldout else heldout_rows_of(found, extent.order, rows),
            config.evaluation.max_samples,
        ),
        tokens=tokens,
        claims=claims,
        claim_samples=extent.claim_samples,
        steps=max(claims, math.ceil(found.steps * tokens / found.tokens)),
        rounds=rounds,
        seconds=None if speed is None else tokens / (speed * workers),
        workers=workers,
        batch_size=config.data.batch_size * config.optimizer.gradient_accumulation_steps,
        sequence_length=config.data.sequence_length,
        memory_bytes=sum(memory.values()),
        memory=memory,
        disk=disk_of_run(
            trained, parameters, config, rounds=rounds, exported=export_dtype(model_dir, config.model)
        ),
        lineage=extent.lineage,
        notes=(
            *copies.notes(),
            *ends_with(extent.order, config),
            *_notes(extent, in_claims, available, workers),
            *_few_rounds(rounds, in_claims, config),
            *_small_batches(found, config),
            *_long_documents(found, config),
            *_template_notes(found),
        ),
        format=form.name,
        columns=dict(form.columns),
        rows=rows + manifest.skipped_rows,
        heldout_rows=found.scaled(found.held_out, rows),
        skipped=_skipped(found, rows, manifest.skipped_rows, config),
        labelled_fraction=found.labelled_fraction,
        batch_sequences=found.sequences_per_step,
        is_exact=found.is_whole and found.rows == rows,
        example=found.example,
        datasets=plan_datasets(
            extent.order, config, found, fraction=tokens / available if available else 0.0
        ),
        configuration=yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
        versions=_versions(),
    )


def _versions() -> tuple[tuple[str, str], ...]:
    """What reads the configuration; a package that a remote task brings along has no version of its own there."""
    from metaflow_hf import __version__

    found = [("metaflow-hf", __version__)]
    for name in ("torch", "transformers", "metaflow"):
        with contextlib.suppress(PackageNotFoundError):
            found.append((name, version(name)))
    return tuple(found)


def _likely_dtype(config: TrainConfig) -> torch.dtype:
    """In which dtype the workers compute, as far as can be told from here."""
    return compute_dtype(config.model, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _rounds(tokens: int, per_claim: float, speed: float, config: TrainConfig) -> int:
    """A round lasts until its time box is over, and then to the end of the claim in hand."""
    claims = math.ceil(config.rounds.seconds * speed / per_claim)
    return math.ceil(tokens / (claims * per_claim * config.rounds.workers))


def _few_rounds(rounds: int, claims: float, config: TrainConfig) -> list[str]:
    """A note where several workers will meet less often than a good model needs, though they have claims enough.

    ``rounds`` is 0 where it is not known.
    """
    workers, seconds = config.rounds.workers, config.rounds.seconds
    if workers == 1 or not 0 < rounds < FEW_ROUNDS or claims / workers < FEW_ROUNDS:
        return []
    note = f"about {rounds} round{'s' * (rounds != 1)}, and a model that {workers} workers make in fewer than {FEW_ROUNDS} is worse"
    return [f"{note}: set rounds.seconds to {seconds * rounds / FEW_ROUNDS:.2g} or less (now {seconds:g})."]


def look(
    extent: Extent,
    training: ReadableBlocks,
    heldout: ReadableBlocks | None,
    *,
    model_dir: Path,
    config: TrainConfig,
) -> Survey:
    """The rows as they will be trained, and those that will be measured, prepared with the model's tokenizer.

    Raises ``BadRowError`` for a row that cannot be used, ``ConfigError`` when nothing would be learned, or nothing
    could be measured.
    """
    tokenizer = training_tokenizer(model_dir, config)
    text = read_architecture(model_dir, config.model).get_text_config(decoder=True)
    encoder = example_encoder(tokenizer, row_format(training, config), config)
    if heldout is not None or config.data.evaluation_dataset is None:
        measured = passages([row.value for row in measured_rows(training, heldout, config)], encoder)
        if not any(passage.predicted for passage in measured):
            raise ConfigError(
                f"none of the held-out rows of {config.data.evaluation_dataset or config.data.title} has anything to "
                "be predicted: name another data.evaluation_dataset."
            )
    sides = held_out(training, heldout, config, samples=extent.samples)

    def survey(blocks: ReadableBlocks, order: Order) -> Survey:
        surveyor = Surveyor(
            blocks,
            example_encoder(tokenizer, row_format(blocks, config), config),
            config,
            held_out=sides,
            max_positions=declared_positions(model_dir, config.model),
            max_tokens=getattr(text, "vocab_size", None),
        )
        return surveyor.survey(order)

    if isinstance(training, MixedBlocks):
        return survey_mixture(training, extent.order, config, survey)
    sizes = training_samples([block.sample_count for block in training.manifest.blocks], config)
    return survey(training, order_of(extent.order, sizes))


def _skipped(found: Survey, rows: int, at_building: int, config: TrainConfig) -> dict[str, int]:
    """The rows that are not used, by reason; those that were left out when the blocks were built are blank ones, or
    unusable ones where these are to be skipped.
    """
    counts = {reason: found.scaled(count, rows) for reason, count in found.skipped.items()}
    if at_building:
        reason = "blank" if config.data.on_bad_row == "raise" else "blank or malformed"
        counts[reason] = counts.get(reason, 0) + at_building
    return counts


def _template_notes(found: Survey) -> list[str]:
    notes = []
    if found.without_thoughts:
        share = math.ceil(100 * found.without_thoughts / found.documents)
        notes.append(
            f"the chat template leaves out the thoughts of about {share} % of the examples: they are not trained. Set "
            "data.chat_template to one that keeps them."
        )
    if found.documents > found.trained:
        notes.append(
            f"the chat template renders earlier turns in another way than the last one, so each turn is an example of its "
            f"own with its history: {found.documents / found.trained:.1f} examples a row, and as many times the tokens."
        )
    return notes


def _long_documents(found: Survey, config: TrainConfig) -> list[str]:
    policy = config.data.long_documents
    if not found.left_out or policy == "split":
        return []
    share = math.ceil(100 * found.left_out / found.documents)
    what = "are left out" if policy == "drop" else "are cut off there"
    length = config.data.sequence_length
    note = f"about {share} % of the documents are longer than data.sequence_length = {length:,} tokens and {what}"
    return [f"{note} (data.long_documents: {policy})."]


def _count_parameters(model_dir: Path, config: TrainConfig) -> tuple[int, int]:
    with torch.device("meta"):
        model = prepare(load_model(model_dir, config.model, initialise=True), config.model)
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)


def _small_batches(found: Survey, config: TrainConfig) -> list[str]:
    """A note where a step holds far fewer sequences than were asked for, because it ends with its claim."""
    wanted = config.data.batch_size * config.optimizer.gradient_accumulation_steps
    if found.sequences_per_step >= SMALL_BATCH * wanted:
        return []
    note = (
        f"a step takes {found.sequences_per_step:.1f} sequences on average, not {wanted} (data.batch_size x "
        "optimizer.gradient_accumulation_steps), because it ends with its claim: raise rounds.claim_samples, or lower "
        "data.sequence_length."
    )
    return [note]


def _notes(extent: Extent, claims: float, available: int, workers: int) -> list[str]:
    notes = []
    claims_per_worker = claims / workers
    if workers > 1 and claims_per_worker < FEW_ROUNDS:
        notes.append(
            f"each worker will train about {claims_per_worker:.0f} claims, too few for {FEW_ROUNDS} rounds: lower "
            "rounds.claim_samples or the number of workers for a better model."
        )
    if extent.max_tokens is not None and extent.max_tokens > available:
        notes.append(
            f"the data holds about {available:,} tokens, fewer than rounds.max_tokens = {extent.max_tokens:,}: training "
            "ends with the data; raise data.epochs to go over it again."
        )
    return notes
