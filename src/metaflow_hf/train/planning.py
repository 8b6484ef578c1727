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
from metaflow_hf.data import BlockManager
from metaflow_hf.data.batches import IGNORE_INDEX, encode_rows
from metaflow_hf.report.outcome import Plan
from metaflow_hf.train.architecture import read_architecture
from metaflow_hf.train.feed import check_tokens
from metaflow_hf.train.footprint import disk_of_run, memory_of_worker
from metaflow_hf.train.heldout import NO_COPIES, Copies, HeldOut
from metaflow_hf.train.models import (
    compute_dtype,
    export_dtype,
    load_model,
    load_tokenizer,
    prepare,
)
from metaflow_hf.train.records import Spec
from metaflow_hf.train.speed import tokens_per_second

logger = logging.getLogger("metaflow_hf.train")

SAMPLED_ROWS: Final = 200
FEW_ROUNDS: Final = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """How much there is: ``samples`` an epoch, held-out ones included, in ``num_positions`` claims of ``claim_samples``
    over all.
    """

    lineage: str
    samples: int
    claim_samples: int
    num_positions: int
    max_tokens: int | None

    @classmethod
    def of(cls, spec: Spec) -> Self:
        """That of a started lineage."""
        return cls(
            lineage=spec.lineage,
            samples=int(spec.order["num_samples"]),
            claim_samples=int(spec.order["claim_samples"]),
            num_positions=spec.num_positions,
            max_tokens=spec.max_tokens,
        )


def make_plan(
    extent: Extent,
    training: BlockManager,
    heldout: BlockManager | None,
    *,
    model_dir: Path,
    config: TrainConfig,
    base_model: Mapping[str, Any],
    speed: float | None = None,
    copies: Copies = NO_COPIES,
) -> Plan:
    """The plan of a run. Tokens are estimated from some rows of the dataset, steps from tokens.

    ``copies`` are those of the evaluation dataset (``count_copies``). ``speed`` is that of one worker in tokens a second, which is otherwise measured on this machine where that is cheap.
    """
    parameters, trained = _count_parameters(model_dir, config)
    samples = round(extent.samples * (1 - HeldOut.of(extent.samples, config).fraction)) - copies.found
    sampled = _sample(training, model_dir, config)
    per_sample = sampled.tokens_per_sample
    available = round(samples * config.data.epochs * per_sample)
    tokens = min(available, extent.max_tokens or available)
    per_claim = per_sample * extent.claim_samples * samples / extent.samples
    per_step = config.data.batch_size * config.data.sequence_length
    per_step *= config.optimizer.gradient_accumulation_steps
    workers = config.rounds.workers
    speed = speed or tokens_per_second(model_dir, config, parameters=parameters)
    # Of the rows looked at, all may be longer than what is trained.
    in_claims = tokens / per_claim if per_claim else 0.0
    rounds = 0 if speed is None or not per_claim else _rounds(tokens, per_claim, speed, config)
    claims = min(extent.num_positions, math.ceil(in_claims))
    manifest = training.manifest
    memory = memory_of_worker(model_dir, config, _likely_dtype(config))
    return Plan(
        base_model=config.model.name,
        model_commit=str(base_model.get("commit_hash", "")),
        dataset=str(config.data.dataset),
        dataset_commit=manifest.commit_hash or "",
        parameters=parameters,
        trainable_parameters=trained,
        samples=samples,
        heldout_samples=min(
            heldout.manifest.total_samples if heldout else extent.samples - samples,
            config.evaluation.max_samples,
        ),
        tokens=tokens,
        claims=claims,
        claim_samples=extent.claim_samples,
        steps=max(claims, math.ceil(tokens / per_step)),
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
            *_notes(extent, in_claims, available, workers),
            *_few_rounds(rounds, in_claims, config),
            *_small_claims(per_claim, per_step, config),
            *sampled.notes(config),
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


@dataclass(frozen=True, slots=True)
class _Sample:
    """What some rows of the dataset say about all."""

    documents: int
    long_documents: int
    tokens_per_sample: float

    def notes(self, config: TrainConfig) -> list[str]:
        policy = config.data.long_documents
        if not self.long_documents or policy == "split":
            return []
        share = math.ceil(100 * self.long_documents / self.documents)
        what = "are left out" if policy == "drop" else "are cut off there"
        length = config.data.sequence_length
        note = f"about {share} % of the documents are longer than data.sequence_length = {length:,} tokens and {what}"
        return [f"{note} (data.long_documents: {policy})."]


def _count_parameters(model_dir: Path, config: TrainConfig) -> tuple[int, int]:
    with torch.device("meta"):
        model = prepare(load_model(model_dir, config.model, initialise=True), config.model)
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)


def _sample(blocks: BlockManager, model_dir: Path, config: TrainConfig) -> _Sample:
    """Documents of rows spread over the first blocks, with the mean tokens (ends included) that a row trains."""
    tokenizer = load_tokenizer(model_dir, trust_remote_code=config.model.trust_remote_code)
    data = config.data
    rows: list[dict[str, Any]] = []
    sizes = [block.sample_count for block in blocks.manifest.blocks][:4]
    for block_id, size in enumerate(sizes):
        rows += blocks.read_rows(block_id, 0, min(size, SAMPLED_ROWS // len(sizes)))
    documents = encode_rows(
        rows,
        tokenizer,
        text_column=data.text_column or blocks.text_column,
        loss_on=data.loss_on,
        on_bad_row=data.on_bad_row,
    )
    text = read_architecture(model_dir, config.model).get_text_config(decoder=True)
    check_tokens(documents, tokenizer, getattr(text, "vocab_size", None))
    if not documents:
        return _Sample(0, 0, 0.0)
    # Whole documents have no length that is too long.
    limit = math.inf if config.rollout.use_chunked_training is True else data.sequence_length
    counted, long = 0, 0
    for document in documents:
        labels, is_long = document.labels, len(document.input_ids) + 1 > limit
        long += is_long
        if is_long and data.long_documents == "drop":
            continue
        if is_long and data.long_documents == "truncate":
            labels = labels[: data.sequence_length - 1]
        counted += sum(label != IGNORE_INDEX for label in labels) + 1
    return _Sample(len(documents), long, counted / len(documents))


def _small_claims(per_claim: float, per_step: int, config: TrainConfig) -> list[str]:
    """A note where a claim is less than a step, which ends with its claim."""
    steps = config.optimizer.gradient_accumulation_steps
    if steps == 1 or per_claim >= per_step:
        return []
    note = f"a step ends with its claim, of about {per_claim:,.0f} tokens here, and could hold {per_step:,} "
    return [
        f"{note}(optimizer.gradient_accumulation_steps: {steps}): raise rounds.claim_samples for larger steps."
    ]


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
