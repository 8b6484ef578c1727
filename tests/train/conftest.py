"""A tiny Llama, a tokenizer and a dataset of blocks, made on the spot; and one call that starts a lineage."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from metaflow_hf.config import TrainConfig
from metaflow_hf.data import BlockManager, process_raw_dataset_to_blocks
from metaflow_hf.demo import tiny_models, tiny_tokenizers
from metaflow_hf.store import ObjectStore, open_store
from metaflow_hf.train import start_lineage, train_worker

WORDS = [
    "the",
    "of",
    "a",
    "to",
    "in",
    "is",
    "it",
    "that",
    "for",
    "as",
    "with",
    "on",
    "be",
    "at",
    "by",
    "this",
    "from",
    "or",
    "an",
    "are",
    "not",
    "value",
    "list",
    "file",
    "name",
]


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


def sentences(seed: int, count: int) -> list[str]:
    dice = random.Random(seed)
    return [" ".join(dice.choices(WORDS, k=dice.randint(8, 40))) for _ in range(count)]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    directory.mkdir()
    config = tiny_models.llama_config(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2, num_kv_heads=1
    )
    files = {
        "config.json": tiny_models.config_file(config),
        "model.safetensors": tiny_models.safetensors_file(tiny_models.llama_weights(config, 1)),
        **tiny_tokenizers.byte_level_bpe(sentences(0, 50), 300),
        **tiny_tokenizers.bpe_config(2048),
    }
    for name, data in files.items():
        (directory / name).write_bytes(data)
    return directory


@pytest.fixture(scope="session")
def dataset_dir(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("datasets")
    texts = sentences(1, 100)
    (root / "raw.txt").write_text("\n".join(texts) + "\n", "utf-8")
    (root / "most.txt").write_text("\n".join(texts[:90]) + "\n", "utf-8")
    process_raw_dataset_to_blocks(root / "most.txt", root / "blocks", "words", block_size=40)
    return root / "blocks"


@dataclass
class Training:
    """One lineage on one store; ``work`` runs one worker in this process."""

    store: ObjectStore
    model_dir: Path
    dataset_dir: Path
    config: TrainConfig
    lineage: str = "test"

    def blocks(self) -> BlockManager:
        return BlockManager(self.dataset_dir, dataset_chunk_size=20)

    def start(self, **sections: Any):
        self.config = self.config.replace(**sections)
        with self.blocks() as blocks:
            return start_lineage(
                store=self.store,
                blocks=blocks,
                model_dir=self.model_dir,
                config=self.config,
                lineage=self.lineage,
            )

    def work(self, **arguments: Any) -> None:
        with self.blocks() as blocks:
            train_worker(
                store=self.store,
                blocks=blocks,
                model_dir=self.model_dir,
                config=self.config,
                lineage=self.lineage,
                **arguments,
            )


@pytest.fixture
def training(tmp_path, model_dir, dataset_dir) -> Training:
    config = TrainConfig.parse(
        {
            "data": {
                # Every row is trained; `heldout_samples` holds out only without it.
                "evaluation_dataset": "another",
                "heldout_samples": 10,
                "sequence_length": 32,
                "batch_size": 4,
                "dataset_chunk_size": 20,
                "seed": 7,
            },
            "optimizer": {"learning_rate": 1e-2},
            "rounds": {"claim_samples": 5, "seconds": 0.3, "keep": "all", "encoding": "fp32"},
        }
    )
    return Training(open_store(tmp_path / "store"), model_dir, dataset_dir, config)
