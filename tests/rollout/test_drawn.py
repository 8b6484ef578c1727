"""Cases drawn at random against full backpropagation in fp64: combinations that no list holds.

DRAWN_CASES=1000 draws more of them, DRAWN_FROM=N begins at another seed.
"""

from __future__ import annotations

import contextlib
import os
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rollout.cases import documents_of
from rollout.conftest import VOCABULARY, gradients
from torch import Tensor, nn

from metaflow_hf.rollout import chunked_segment_rollout

NUM_CASES = int(os.environ.get("DRAWN_CASES", "24"))
FIRST = int(os.environ.get("DRAWN_FROM", "1"))
FAMILIES = (
    *("llama", "mistral", "gemma2", "gpt_oss", "llama4_text", "qwen3_next", "mamba2", "lfm2", "falcon_h1"),
    *("gpt2", "deepseek_v2", "gpt_neo", "opt"),
)
EAGER = frozenset({"gpt_oss", "gpt_neo", "gemma2", "mamba2"})
WINDOWS = {
    "mistral": "sliding_window",
    "gemma2": "sliding_window",
    "gpt_oss": "sliding_window",
    "llama4_text": "attention_chunk_size",
}


@dataclass
class Drawn:
    """A model's family and changes, a batch and the documents that it stands for, and how it is rolled out."""

    family: str
    changes: dict[str, Any]
    batch: dict[str, Tensor]
    documents: list[dict[str, Tensor]]
    ignore_index: int
    options: dict[str, Any]
    backward: bool
    trains: bool
    frozen: float
    block_bytes: int
    seed: int = field(repr=False)

    def divisor(self) -> float:
        given = self.options.get("num_items_in_batch")
        counted = int((self.batch["labels"][:, 1:] != self.ignore_index).sum())
        return max(counted, 1) if given is None else float(given)


def draw(seed: int) -> Drawn:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    family = rng.choice(FAMILIES)
    eager = family in EAGER or rng.random() < 0.2
    changes: dict[str, Any] = {"_attn_implementation": "eager" if eager else "sdpa"}
    if family in WINDOWS:
        changes[WINDOWS[family]] = rng.choice([1, 2, 3, 5, 8, 9, 16, 40])
    if family not in {"gpt2", "mamba2"} and rng.random() < 0.3:
        changes["tie_word_embeddings"] = True
    ignore_index = rng.choice([-100, -100, -1, 0])
    batch = _padded(rng, ignore_index, predicts_first=not eager and rng.random() < 0.4)
    documents = [_as_transformers_takes_it(family, batch)]
    if rng.random() < 0.3:
        batch = _packed(rng, ignore_index)
        documents = list(documents_of(batch))
    return Drawn(
        family=family,
        changes=changes,
        batch=batch,
        documents=documents,
        ignore_index=ignore_index,
        options={
            "chunk_size": rng.choice([1, 2, 3, 5, 8, 9, 10, 16, 17, 40, 100]),
            "gradient_checkpointing": rng.random() < 0.3,
            "use_cpu_offload": rng.random() < 0.4,
            "num_items_in_batch": rng.choice([None, None, 7.0, torch.tensor(5)]),
            "ce_loss_fn": rng.choice([None, None, None, _sum, _each]),
        },
        backward=rng.random() < 0.5,
        trains=rng.random() < 0.5,
        frozen=rng.choice([0, 0, 0.3, 0.9]),
        block_bytes=rng.choice([512, 1024, 4096, 2**26]),
        seed=seed,
    )


def _sum(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, reduction="sum")


def _each(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, reduction="none")


def _ids(rng: random.Random) -> Tensor:
    return torch.randint(3, VOCABULARY, (rng.choice([1, 2, 3]), rng.choice([1, 2, 3, 5, 9, 17, 24, 33, 41])))


def _labels(rng: random.Random, ids: Tensor, ignore_index: int) -> Tensor:
    labels = ids.masked_fill(torch.rand(ids.shape) < rng.choice([0, 0, 0.5, 0.95, 1]), ignore_index)
    if rng.random() < 0.2:
        labels[rng.randrange(len(ids))] = ignore_index
    return labels


def _padded(rng: random.Random, ignore_index: int, *, predicts_first: bool) -> dict[str, Tensor]:
    """On the left, the right, both or nowhere; a row may be padding alone."""
    ids, sides = _ids(rng), rng.choice([(), ("left",), ("right",), ("left", "right")])
    labels, length = _labels(rng, ids, ignore_index), ids.shape[1]
    if not sides:
        return {"input_ids": ids, "labels": labels}
    mask = torch.ones_like(ids)
    for row in range(len(ids)):
        left = rng.randint(0, length - 1) if "left" in sides else 0
        right = rng.randint(0, length - 1 - left) if "right" in sides else 0
        mask[row, :left] = 0
        mask[row, length - right :] = 0
        if not predicts_first:
            labels[row, left] = ignore_index
    if len(ids) > 1 and rng.random() < 0.2:
        mask[1] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels.masked_fill(mask == 0, ignore_index),
    }


def _packed(rng: random.Random, ignore_index: int) -> dict[str, Tensor]:
    ids = _ids(rng)
    labels, positions = _labels(rng, ids, ignore_index), torch.zeros_like(ids)
    for row in range(len(ids)):
        start = 0
        while start < ids.shape[1]:
            stop = min(start + rng.choice([1, 2, 3, 5, 9, 17, 30]), ids.shape[1])
            positions[row, start:stop] = torch.arange(stop - start)
            labels[row, start] = ignore_index
            start = stop
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


def _as_transformers_takes_it(family: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    mask = batch.get("attention_mask")
    if mask is None or family == "mamba2":
        return batch
    return {**batch, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def expected(model: nn.Module, case: Drawn) -> tuple[float, dict[str, Tensor]]:
    total = 0.0
    for document in case.documents:
        inputs = {name: value for name, value in document.items() if name != "labels"}
        logits = model(**inputs).logits[:, :-1].flatten(0, 1)
        labels = document["labels"][:, 1:].flatten()
        loss = F.cross_entropy(logits, labels, ignore_index=case.ignore_index, reduction="sum")
        (loss / case.divisor()).backward()
        total += loss.item() / case.divisor()
    found = gradients(model)
    model.zero_grad()
    return total, found


@pytest.mark.timeout(120 + NUM_CASES)
@pytest.mark.parametrize("part", range(4))
def test_whatever_is_drawn_has_the_gradients_of_full_backprop(part, make_model, offloading, monkeypatch):
    models: dict[str, Any] = {}
    for seed in range(FIRST + part, FIRST + NUM_CASES, 4):
        case = draw(seed)
        key = f"{case.family} {case.changes}"
        model = models.setdefault(key, None) or make_model(case.family, **case.changes)
        models[key] = model
        rng = random.Random(seed)
        for parameter in model.parameters():
            parameter.requires_grad_(rng.random() >= case.frozen)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            continue
        model.train(case.trains)
        loss, wanted = expected(model, case)
        monkeypatch.setattr("metaflow_hf.rollout.blocks._BLOCK_BYTES", case.block_bytes)

        with offloading if case.options["use_cpu_offload"] else contextlib.nullcontext():
            rolled, _ = chunked_segment_rollout(
                model,
                case.batch,
                ignore_index=case.ignore_index,
                backward=case.backward,
                **case.options,
            )
            if not case.backward:
                rolled.backward()

        assert rolled.item() == pytest.approx(loss, rel=1e-9, abs=1e-12), case
        _assert_close(gradients(model), wanted, case)
        model.zero_grad()


def _assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], case: Drawn) -> None:
    """A gradient of zero may be missing on either side."""
    largest = max([float(gradient.norm()) for gradient in wanted.values()], default=0.0)
    for name in found.keys() | wanted.keys():
        ours, right = (side.get(name, torch.zeros_like((found | wanted)[name])) for side in (found, wanted))
        bound = 1e-8 * max(float(right.norm()), 1e-6 * largest) + 1e-14
        assert float((ours - right).norm()) <= bound, (name, case)
