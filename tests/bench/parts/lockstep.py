"""Trainings by rounds in one process: the shipped trainer, encodings, merge and outer step, one worker after another.

What is left out is what costs time and decides nothing about the model: claims by many, waiting, heartbeats.
"""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from metaflow_hf.config import TrainConfig
from metaflow_hf.data.formats import DetectedFormat
from metaflow_hf.data.ledger import Claim
from metaflow_hf.data.order import ClaimOrder
from metaflow_hf.demo import corpus, tiny_models, tiny_tokenizers
from metaflow_hf.store import ObjectStore
from metaflow_hf.train.encoding import example_encoder
from metaflow_hf.train.evaluation import evaluate
from metaflow_hf.train.files import PayloadFiles
from metaflow_hf.train.lineage import ClosedRound, Lineage
from metaflow_hf.train.merge import Merger
from metaflow_hf.train.models import load_model, load_tokenizer, prepare
from metaflow_hf.train.outer import OuterStep
from metaflow_hf.train.ranges import Positions
from metaflow_hf.train.records import Delta, Encoding, Payload, Round
from metaflow_hf.train.schedule import Budget, Schedule
from metaflow_hf.train.tensors import Layout, TensorReader, write_tensors
from metaflow_hf.train.trainer import ModelTrainer
from metaflow_hf.train.worker import ROUNDS_PER_INNER

ROW_TOKENS = 120


@dataclass(frozen=True, slots=True)
class Text:
    """Rows to train on and rows held out, and a directory with an untrained model and its tokenizer."""

    train: list[str]
    held_out: list[str]
    model_dir: Path

    def read_rows(self, block_id: int, start: int, stop: int) -> list[dict[str, Any]]:
        del block_id
        return [{"text": text} for text in self.train[start:stop]]


def prepare_text(directory: Path, *, held_out: int, vocab_size: int = 1024, **model: int) -> Text:
    """The documentation of this Python and a Llama of about a million parameters, or as ``model`` says."""
    docs = corpus.python_docs()
    train = [row.text for row in docs.train]
    config = tiny_models.llama_config(vocab_size=vocab_size, **model)
    directory.mkdir(parents=True)
    files = {
        "config.json": tiny_models.config_file(config),
        **tiny_tokenizers.byte_level_bpe(train, vocab_size),
        **tiny_tokenizers.bpe_config(2048),
    }
    for name, data in files.items():
        (directory / name).write_bytes(data)
    step = max(len(docs.test) // held_out, 1)
    pieces = list(_pieces(train, load_tokenizer(directory)))
    return Text(pieces, [row.text for row in docs.test[::step]][:held_out], directory)


def _pieces(texts: Iterable[str], tokenizer: Any) -> Iterator[str]:
    """Rows of one length, so that a claim is a known number of full steps."""
    for text in texts:
        tokens = tokenizer(text)["input_ids"]
        for start in range(0, len(tokens) - ROW_TOKENS + 1, ROW_TOKENS):
            yield tokenizer.decode(tokens[start : start + ROW_TOKENS])


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One training: ``workers`` do ``claims`` claims each in a round; ``killed`` is the chance that a worker dies
    in a round with all it did in it; before the fraction ``solo_start`` of the tokens one works alone.
    """

    config: TrainConfig
    claims: int
    workers: int
    outer_step: OuterStep
    encoding: Encoding = "int8/1024"
    killed: float = 0.0
    solo_start: float = 0.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """Held-out loss in nats per token, tokens that are in the model, rounds, and contributions lost with workers."""

    loss: float
    tokens: int
    rounds: int
    lost: int


class Training:
    """One lineage; ``run`` takes it to its end. ``store`` is empty, ``scratch`` a directory for files."""

    def __init__(self, setting: Setting, text: Text, store: ObjectStore, scratch: Path) -> None:
        self.setting = setting
        self.text = text
        config = setting.config
        rows = len(text.train)
        claim_samples = config.rounds.claim_samples
        assert isinstance(claim_samples, int)
        self.order = ClaimOrder([rows], rows, claim_samples, seed=config.data.seed, epochs=config.data.epochs)
        self.budget = Budget(self.order.num_positions, config.rounds.max_tokens)
        optimizer = config.optimizer
        self.schedule = Schedule(
            optimizer.learning_rate,
            optimizer.schedule,
            optimizer.warmup_fraction,
            optimizer.final_fraction,
        )
        self.lineage = Lineage(store)
        self.files = PayloadFiles(store, scratch)
        self.dice = random.Random(config.data.seed)
        self.tokenizer = load_tokenizer(text.model_dir)
        self.workers: dict[int, ModelTrainer] = {}
        self.lost = 0

    def run(self) -> Outcome:
        base = self._first_round()
        while not base.manifest.final:
            base = self._round(base)
            self.files.keep_only((base.manifest.weights, base.manifest.outer, base.manifest.inner))
            self.lineage.sweep(base)
        return Outcome(self._measure(base), base.manifest.tokens, base.number, self.lost)

    def _first_round(self) -> ClosedRound:
        model = self._new_model()
        draft = self.files.draft("initial")
        parameters = dict(model.named_parameters())
        layouts = {name: Layout(tuple(p.shape)) for name, p in parameters.items()}
        digest = write_tensors(draft, layouts, sorted(parameters.items()))
        weights = self.lineage.upload_payload(self.files.adopt(draft, digest), "weights", 0, digest)
        return self.lineage.create_round(Round(nonce="0", round=0, parent=None, weights=weights))

    def _round(self, base: ClosedRound) -> ClosedRound:
        manifest = base.manifest
        begun = self.budget.fraction(len(manifest.settled), manifest.tokens)
        solo = begun < self.setting.solo_start
        goal, count = (self.setting.solo_start, 1) if solo else (1.0, self.setting.workers)
        everything = Positions.from_ranges([(0, self.order.num_positions)])
        free = iter(everything - manifest.settled)
        dead = [count > 1 and self.dice.random() < self.setting.killed for _ in range(count)]
        inner: Payload | None = None
        for number in range(count):
            mine = [position for position, _ in zip(free, range(self.setting.claims), strict=False)]
            if dead[number] and not all(dead):
                # What it would have trained is trained by others in later rounds.
                self.workers.pop(number, None)
                self.lost += 1
            elif mine:
                inner = self._contribute(base, number, mine, count, goal) or inner
        merger = Merger(
            lineage=self.lineage,
            files=self.files,
            attempt="closer",
            num_positions=self.order.num_positions,
            max_tokens=self.budget.max_tokens,
            outer_step=self.setting.outer_step,
        )
        return merger.close(base, {}, inner=inner)

    def _contribute(
        self, base: ClosedRound, number: int, mine: Iterable[int], contributors: int, goal: float
    ) -> Payload | None:
        """Trains and publishes as one worker does; the inner state where it is due for newcomers."""
        manifest = base.manifest
        trainer = self.workers.get(number)
        newcomer = trainer is None
        if trainer is None:
            trainer = self.workers[number] = self._new_trainer()
        inner = self.files.fetch(manifest.inner) if newcomer and manifest.inner else None
        trainer.load(self.files.fetch(manifest.weights), inner)
        done, tokens, loss = 0, 0, 0.0
        trained = []
        settled = len(manifest.settled)

        def fraction(part: float = 0.0, more: int = 0) -> float:
            return self.budget.fraction(
                settled + contributors * (done + part), manifest.tokens + contributors * (tokens + more)
            )

        for position in mine:
            if done and fraction() >= goal:
                break
            span = self.order.locate(position)
            claim = Claim(span.block_id, span.chunk_id, span.start, span.stop, span.epoch, position, "")
            own = 0
            for step in trainer.train(claim, lambda part, more: self.schedule.at(fraction(part, more))):
                own += step.tokens
                loss += step.loss * step.tokens
            done, tokens = done + 1, tokens + own
            trained.append(position)
        trainer.keep()
        attempt = f"{number:02d}"
        encoding: Encoding = "weights" if contributors == 1 else self.setting.encoding
        draft = self.files.draft("delta")
        digest = trainer.write(draft, self.files.fetch(manifest.weights), encoding)
        path = self.files.adopt(draft, digest)
        tensors = self.lineage.upload_delta(path, base.number, attempt, digest)
        delta = Delta(
            base=base.digest,
            attempt=attempt,
            positions=Positions.of(trained).to_json(),
            tokens=tokens,
            loss=loss / max(tokens, 1),
            encoding=encoding,
            tensors=tensors,
            inner=self._inner(trainer, base) if contributors == 1 else None,
        )
        self.lineage.publish(base.number, delta)
        due = contributors > 1 and (base.number + 1) % ROUNDS_PER_INNER == 0
        return self._inner(trainer, base) if due else None

    def _inner(self, trainer: ModelTrainer, base: ClosedRound) -> Payload:
        draft = self.files.draft("inner")
        digest = trainer.write_inner(draft)
        return self.lineage.upload_payload(self.files.adopt(draft, digest), "inner", base.number + 1, digest)

    def _new_model(self) -> Any:
        config = self.setting.config
        model = load_model(self.text.model_dir, config.model, seed=config.data.seed)
        return prepare(model, config.model)

    def _new_trainer(self) -> ModelTrainer:
        return ModelTrainer(
            self._new_model(),
            example_encoder(self.tokenizer, DetectedFormat("text", {"text": "text"}), self.setting.config),
            self.text,
            self.order,
            self.setting.config,
            device=torch.device("cpu"),
        )

    def _measure(self, base: ClosedRound) -> float:
        model = self._new_model()
        with TensorReader(self.files.fetch(base.manifest.weights)) as reader, torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(reader[name])
        length = self.setting.config.data.sequence_length
        found = evaluate(model, self.text.held_out, self.tokenizer, sequence_length=length)
        return found.loss
