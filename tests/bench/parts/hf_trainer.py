"""The same training by transformers' own Trainer, for comparison: the batches of our claims, in our order."""

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from metaflow_hf.config import TrainConfig
from metaflow_hf.data import BlockManager, process_raw_dataset_to_blocks
from metaflow_hf.data.batches import Batch
from metaflow_hf.data.ledger import Claim
from metaflow_hf.demo import tiny_models, tiny_tokenizers
from metaflow_hf.store import ObjectStore
from metaflow_hf.train import start_lineage, train_worker
from metaflow_hf.train.encoding import example_encoder
from metaflow_hf.train.feed import Feed
from metaflow_hf.train.heldout import held_out, training_samples
from metaflow_hf.train.lineage import Lineage
from metaflow_hf.train.models import load_model, load_tokenizer
from metaflow_hf.train.spec import order_of

_WORDS = [
    f"{a}{b}" for a in ("ba", "ko", "li", "mu", "ne", "ra", "so", "ti") for b in ("ka", "lo", "mi", "nu", "")
]


@dataclass(frozen=True)
class Setting:
    """A model, a dataset of blocks and a configuration in which the Trainer can be told to do the same."""

    model_dir: Path
    dataset_dir: Path
    config: TrainConfig

    def blocks(self) -> BlockManager:
        return BlockManager(self.dataset_dir, dataset_chunk_size=self.config.data.dataset_chunk_size)


def make_setting(
    root: Path,
    *,
    rows: int,
    sequence_length: int,
    batch_size: int,
    claim_samples: int,
    vocab_size: int = 400,
    **shape: int,
) -> Setting:
    """A Llama of ``shape`` with random weights, and ``rows`` rows of made-up words."""
    dice = random.Random(0)
    texts = [" ".join(dice.choices(_WORDS, k=dice.randint(60, 120))) for _ in range(rows)]
    model_dir = root / "model"
    model_dir.mkdir(parents=True)
    config = tiny_models.llama_config(vocab_size=vocab_size, **shape)
    for name, data in {
        "config.json": tiny_models.config_file(config),
        "model.safetensors": tiny_models.safetensors_file(tiny_models.llama_weights(config, 1)),
        **tiny_tokenizers.byte_level_bpe(texts[:200], 400),
        **tiny_tokenizers.bpe_config(2048),
    }.items():
        (model_dir / name).write_bytes(data)
    (root / "raw.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    process_raw_dataset_to_blocks(root / "raw.jsonl", root / "blocks", "words", block_size=1000)
    values = {
        "data": {
            "heldout_samples": 1,
            "sequence_length": sequence_length,
            "batch_size": batch_size,
            "dataset_chunk_size": 10 * claim_samples,
            "seed": 3,
        },
        # A constant rate, as the Trainer has it without a warmup.
        "optimizer": {"learning_rate": 1e-3, "schedule": "constant", "warmup_fraction": 0.0},
        "rounds": {"claim_samples": claim_samples, "seconds": 60.0},
    }
    return Setting(model_dir, root / "blocks", TrainConfig.parse(values))


class Enough(BaseException):
    """So many steps were wanted."""


def start_ours(setting: Setting, store: ObjectStore) -> None:
    """Starts the lineage, so that its batches are known."""
    with setting.blocks() as blocks:
        start_lineage(**_ours(setting, store, blocks))


def _ours(setting: Setting, store: ObjectStore, blocks: BlockManager) -> dict[str, Any]:
    return {
        "store": store,
        "blocks": blocks,
        "model_dir": setting.model_dir,
        "config": setting.config,
        "lineage": "compared",
    }


def train_ours(setting: Setting, store: ObjectStore, steps: int, on_event) -> None:
    """As one worker of a lineage, for so many steps; ``on_event`` gets them."""
    with setting.blocks() as blocks:
        shared = _ours(setting, store, blocks)
        start_lineage(**shared)
        counted = _Counter(steps, on_event)
        try:
            train_worker(**shared, on_event=counted)
        except Enough:
            return
    assert counted.left == 0, "the data ended before"


class _Counter:
    def __init__(self, steps: int, on_event) -> None:
        self.left = steps
        self._on_event = on_event

    def __call__(self, event) -> None:
        self._on_event(event)
        if type(event).__name__ == "StepDone":
            self.left -= 1
            if not self.left:
                raise Enough


def batches_of(setting: Setting, store: ObjectStore, steps: int) -> list[Batch]:
    """The batches of the first steps of a lineage, in its order."""
    spec = Lineage(store).spec()
    with setting.blocks() as blocks:
        samples = training_samples([block.sample_count for block in blocks.manifest.blocks], setting.config)
        order = order_of(spec.order, samples)
        feed = Feed(
            blocks,
            order,
            example_encoder(load_tokenizer(setting.model_dir), blocks.format, setting.config),
            setting.config,
            held_out=held_out(blocks, None, setting.config),
        )
        with closing(feed):
            found: list[Batch] = []
            for position in range(order.num_positions):
                span = order.locate(position)
                claim = Claim(span.block_id, span.chunk_id, span.start, span.stop, span.epoch, position, "")
                found += [batch for batch in feed.batches(claim) if batch.num_tokens]
                if len(found) >= steps:
                    break
    return found[:steps]


class _Batches(Dataset):
    """One batch an item; the collator takes it as it is."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        batch = self._batches[number]
        labels = batch.labels.clone()
        # Nothing predicts the first token; the Trainer's count of labels would have it.
        labels[:, 0] = -100
        return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": labels}


class _InOrder(Trainer):
    """A Trainer that keeps the loss of each step as it is, and takes its batches in their order."""

    losses: list[float]

    def training_step(self, *arguments, **options) -> torch.Tensor:
        loss = super().training_step(*arguments, **options)
        self.losses.append(float(loss))
        return loss

    def _get_train_sampler(self, *_: object) -> Iterator[int]:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def train_theirs(setting: Setting, batches: Sequence[Batch], scratch: Path) -> list[float]:
    """The losses of the Trainer's steps on these batches, with the same model and hyperparameters."""
    optimizer = setting.config.optimizer
    trainer = _InOrder(
        model=load_model(setting.model_dir, setting.config.model),
        args=TrainingArguments(
            output_dir=str(scratch),
            per_device_train_batch_size=1,
            max_steps=len(batches),
            learning_rate=optimizer.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=optimizer.weight_decay,
            adam_beta1=optimizer.betas[0],
            adam_beta2=optimizer.betas[1],
            adam_epsilon=optimizer.eps,
            max_grad_norm=optimizer.max_grad_norm,
            optim="adamw_torch_fused",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            use_cpu=True,
            remove_unused_columns=False,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        data_collator=lambda items: items[0],
        train_dataset=_Batches(batches),
    )
    trainer.losses = []
    trainer.train()
    return trainer.losses


def plain_loop(setting: Setting, batches: Sequence[Batch]) -> list[float]:
    """The same by hand, as in every tutorial: what any framework costs beside it."""
    settings = setting.config.optimizer
    model = AutoModelForCausalLM.from_pretrained(setting.model_dir, dtype=torch.float32).train()
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in named.values() if p.dim() >= 2], "weight_decay": settings.weight_decay},
            {"params": [p for p in named.values() if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        fused=True,
    )
    losses = []
    for batch in batches:
        loss = model(**batch.to_mapping()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
