"""From a configuration to a started lineage, and to a worker that trains it."""

import logging
import random
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import msgspec
import torch

from metaflow_hf.config import TrainConfig
from metaflow_hf.data.manager import BlockManager
from metaflow_hf.data.mixture import MixedBlocks, ReadableBlocks, name_block
from metaflow_hf.data.order import Order
from metaflow_hf.events import Notice, OnEvent, ignore
from metaflow_hf.report import fan_out
from metaflow_hf.store.objects import ObjectStore, new_nonce
from metaflow_hf.store.probing import probe
from metaflow_hf.train.architecture import called
from metaflow_hf.train.assembly import assemble_worker
from metaflow_hf.train.closing import Pace
from metaflow_hf.train.encoding import (
    example_encoder,
    row_format,
    rows_of_step,
    training_tokenizer,
    with_template_date,
)
from metaflow_hf.train.heartbeat import Heartbeat, Patience, give_up_earlier_attempts, this_process
from metaflow_hf.train.heldout import held_out, training_samples
from metaflow_hf.train.isolation import require_isolation
from metaflow_hf.train.lineage import Lineage
from metaflow_hf.train.measuring import measuring
from metaflow_hf.train.mixtures import describe_parts, spec_datasets
from metaflow_hf.train.models import load_parts, load_trainable, prepare, trained_parameters
from metaflow_hf.train.nonfinite import save_bad_step
from metaflow_hf.train.outcome_check import check_trained
from metaflow_hf.train.pinning import sources_of
from metaflow_hf.train.records import Payload, Round, Spec
from metaflow_hf.train.schedule import Budget, Schedule
from metaflow_hf.train.sides import HeldOut
from metaflow_hf.train.spec import check_same, make_spec, order_of
from metaflow_hf.train.stopping import StopReasons
from metaflow_hf.train.stored_metrics import StoredMetrics
from metaflow_hf.train.team import open_team
from metaflow_hf.train.tensors import write_all
from metaflow_hf.train.text_part import check_text_part
from metaflow_hf.train.trainer import ModelTrainer
from metaflow_hf.train.validation import Validator
from metaflow_hf.train.weight_check import check_finite
from metaflow_hf.train.worker import Plan, new_attempt

logger = logging.getLogger("metaflow_hf.train")

# In a specification that is only looked at.
NO_WEIGHTS: Final = Payload(key="", digest="", size=0)


def start_lineage(
    *,
    store: ObjectStore,
    blocks: ReadableBlocks,
    model_dir: Path,
    config: TrainConfig,
    lineage: str,
    base_model: Mapping[str, Any] | None = None,
    heldout: BlockManager | None = None,
    check: Callable[[Spec], None] = lambda _: None,
) -> Spec:
    """Starts a lineage, or joins the one that is there: idempotent, and safe by many at once.

    ``store`` is rooted at ``training/<lineage>/``; ``base_model`` is the reference of ``model_dir``, ``heldout`` the
    evaluation dataset, where one is configured. ``check`` is called with what a new lineage would be, before anything is
    stored; when it raises, nothing is. Stores the initial weights, then ``spec.json``, then round 0.
    Raises ``LineageMismatch`` when the lineage was started with another configuration, ``ConfigError`` for a
    dataset that is incomplete or too small, ``UnsupportedModelError``, ``UnsupportedStore``.
    """
    probe(store)
    target = Lineage(store)
    manifest = blocks.wait_complete()
    is_new = not store.children("rounds")
    asked = config
    config = with_template_date(asked, model_dir, None if is_new else target.spec())
    sides = held_out(blocks, heldout, config)
    if is_new:
        check(_spec(blocks, model_dir, config, lineage, NO_WEIGHTS, sides))
        with tempfile.TemporaryDirectory(prefix="lineage-") as scratch:
            weights = _store_initial_weights(target, Path(scratch), model_dir, config)
        sources = sources_of(
            config,
            base_model=base_model or {},
            dataset_commit=manifest.commit_hash,
            evaluation_commit=heldout.manifest.commit_hash if heldout else None,
        )
        ours = _spec(blocks, model_dir, config, lineage, weights, sides)
        datasets = spec_datasets(blocks, config) if isinstance(blocks, MixedBlocks) else msgspec.UNSET
        spec = target.create_spec(msgspec.structs.replace(ours, sources=sources, datasets=datasets))
        config = with_template_date(asked, model_dir, spec)
        check_same(spec, _spec(blocks, model_dir, config, lineage, weights, sides, resolved=spec))
        first = Round(nonce=new_nonce(), round=0, parent=None, weights=spec.initial_weights)
        target.create_round(first)
    spec = target.spec()
    check_same(spec, _spec(blocks, model_dir, config, lineage, spec.initial_weights, sides, resolved=spec))
    if config.rounds.keep == "all":
        target.keep_all()
    logger.info(f"lineage {lineage}: {spec.num_positions} positions of {manifest.dataset_name}")
    return spec


def train_worker(
    *,
    store: ObjectStore,
    blocks: ReadableBlocks,
    model_dir: Path,
    config: TrainConfig,
    lineage: str,
    device: torch.device | str | None = None,
    attempt: str | None = None,
    on_event: OnEvent = ignore,
    stop: threading.Event | None = None,
    notice: Path | None = None,
    heldout: BlockManager | None = None,
    task: str | None = None,
    is_retry: bool = False,
    patience: Patience | None = None,
    pace: Pace | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    rng: random.Random | None = None,
) -> None:
    """Trains as one of any number of workers, and returns only when the lineage is final.

    ``store`` is rooted at ``training/<lineage>/``, which ``start_lineage`` started. ``stop``, once set (by a signal
    handler), ends the work within ``rounds.grace_seconds`` (unless ``pace`` says otherwise) plus one upload: what is
    finished is published, the claim in hand dropped. So does the file ``notice`` once it exists
    (``current.spot_termination_notice``), and the death of the parent process. Any end but a final lineage raises:
    ``TrainingIncomplete`` when stopped or when a position fails again and again, ``LineageMismatch`` for another
    configuration, ``NonFiniteLoss``, ``StoreUnavailable`` after bounded retries. ``device`` defaults to the first
    visible GPU, else the CPU. With ``evaluation.every_rounds`` held-out rows are measured meanwhile: those of
    ``heldout``, where an evaluation dataset is configured, copies of which are not trained. ``task`` names the task of a flow that this process is an
    attempt of; with ``is_retry`` the attempts before it are given up at once, instead of when their heartbeats have
    been still for long enough.
    """
    rng = rng or random.SystemRandom()
    attempt = attempt or new_attempt(rng)
    pace = pace or Pace(grace=config.rounds.grace_seconds)
    reasons = StopReasons(stop or threading.Event(), grace=pace.grace, notice=notice, clock=clock)
    target = Lineage(store)
    spec, sides = target.spec(), held_out(blocks, heldout, config)
    config = with_template_date(config, model_dir, spec)
    check_same(spec, _spec(blocks, model_dir, config, lineage, spec.initial_weights, sides, resolved=spec))
    newest = target.newest()
    if newest is not None and newest.manifest.final:
        check_trained(spec, newest)
        message = f"the lineage {lineage} is final since round {newest.number}: nothing is left to train."
        on_event(Notice(time=time.time(), worker=attempt, message=message))
        return
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    order = order_of(spec.order, _samples(blocks, config))
    heartbeat = Heartbeat(
        store, attempt, patience=patience or Patience(), process=this_process(), task=task, clock=clock
    )
    if task is not None and is_retry:
        give_up_earlier_attempts(store, task)

    def progress() -> None:
        heartbeat.progress()
        reasons.raise_when_over()

    with open_team(model_dir, config, place) as team:
        model = load_trainable(model_dir, config, place)
        tokenizer = training_tokenizer(model_dir, config)
        trainer = ModelTrainer(
            model,
            example_encoder(tokenizer, row_format(blocks, config), config),
            blocks,
            order,
            config,
            device=place,
            held_out=sides,
            progress=progress,
            save_bad=lambda step: save_bad_step(store, step),
            team=team,
        )
        plan = _plan(config, spec, blocks, order)
        metrics = StoredMetrics(store, attempt, clock=clock)
        listener = fan_out(on_event, metrics)
        validator = Validator(
            lineage=target,
            attempt=attempt,
            settings=config.evaluation,
            measure=measuring(model, tokenizer, blocks, heldout, config),
            on_event=listener,
        )
        with tempfile.TemporaryDirectory(prefix="worker-") as scratch, closing(metrics):
            worker = assemble_worker(
                plan=plan,
                lineage=target,
                blocks=blocks if isinstance(blocks, BlockManager) else blocks.manifest,
                order=order,
                trainer=trainer,
                heartbeat=heartbeat,
                scratch=Path(scratch),
                attempt=attempt,
                rounds=config.rounds,
                pace=pace,
                on_event=listener,
                validator=validator if config.evaluation.every_rounds is not None else None,
                stop=reasons,
                clock=clock,
                sleep=sleep,
                rng=rng,
            )
            trainer.foresee = worker.ledger.foresee
            with closing(trainer):
                worker.run()
            last = target.newest()
            assert last is not None
            check_trained(spec, last)


def _plan(config: TrainConfig, spec: Spec, blocks: ReadableBlocks, order: Order) -> Plan:
    rounds, settings = config.rounds, config.optimizer

    def describe(position: int) -> str:
        span = order.locate(position)
        return f"{name_block(blocks, span.block_id)}, rows {span.start} to {span.stop}"

    return Plan(
        budget=Budget(spec.num_positions, spec.max_tokens),
        schedule=Schedule(
            settings.learning_rate,
            settings.schedule,
            settings.warmup_fraction,
            settings.final_fraction,
            settings.decay_fraction,
        ),
        workers=rounds.workers,
        solo_start=rounds.solo_start,
        max_failures=rounds.max_failures,
        skip_failing=rounds.on_failure == "skip",
        keep_all=rounds.keep == "all",
        describe=describe,
    )


def _store_initial_weights(lineage: Lineage, scratch: Path, model_dir: Path, config: TrainConfig) -> Payload:
    name = called(model_dir, config.model)
    loaded = load_parts(model_dir, config.model, seed=config.data.seed)
    check_finite(loaded.whole, name)
    if loaded.whole is not loaded.language:
        check_text_part(loaded.whole, loaded.language, name)
    model = prepare(loaded.language, config.model, seed=config.data.seed)
    if config.data.packing == "isolated":
        # A worker would refuse it too, after everything else was made ready.
        require_isolation(model)
    weights = {name: p.detach().float() for name, p in trained_parameters(model).items()}
    path = scratch / "initial.safetensors"
    digest = write_all(path, weights)
    return lineage.upload_payload(path, "weights", 0, digest)


def _spec(
    blocks: ReadableBlocks,
    model_dir: Path,
    config: TrainConfig,
    lineage: str,
    weights: Payload,
    sides: HeldOut,
    *,
    resolved: Spec | None = None,
) -> Spec:
    """The specification that this configuration asks for; ``auto`` takes what an existing one resolved it to."""
    if resolved is not None and config.rounds.claim_samples == "auto":
        config = config.replace(rounds={"claim_samples": resolved.order["claim_samples"]})
    form, rows = row_format(blocks, config), 1
    if config.rounds.claim_samples == "auto":
        encoder = example_encoder(training_tokenizer(model_dir, config), form, config)
        rows = rows_of_step(blocks, encoder, config)
    return make_spec(
        config,
        lineage=lineage,
        manifest=blocks.manifest,
        chunk_size=blocks.dataset_chunk_size,
        model_dir=model_dir,
        initial_weights=weights,
        evaluation_rows=sides.digest,
        form=form,
        step_rows=rows,
        datasets=describe_parts(blocks, config) if isinstance(blocks, MixedBlocks) else (),
    )


def _samples(blocks: ReadableBlocks, config: TrainConfig) -> list[int]:
    return training_samples([block.sample_count for block in blocks.manifest.blocks], config)
