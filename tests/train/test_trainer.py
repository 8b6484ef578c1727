"""From a claim to optimiser steps."""

import pytest
import torch

from metaflow_hf.data.ledger import Claim
from metaflow_hf.data.order import ClaimOrder
from metaflow_hf.errors import NonFiniteLoss, TrainingIncomplete
from metaflow_hf.train.lineage import Lineage
from metaflow_hf.train.models import load_model, load_tokenizer, prepare
from metaflow_hf.train.trainer import ModelTrainer

LONG = " ".join(["the value of a file is not the name of it"] * 20)


class Rows:
    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def read_rows(self, block_id, start, stop):
        return [{"text": text} for text in self.texts[start:stop]]


def trainer_of(
    training,
    texts,
    *,
    model=None,
    claim_samples=None,
    progress=lambda: None,
    held_out=frozenset(),
    **sections,
):
    config = training.config.replace(**sections)
    return ModelTrainer(
        prepare(model or load_model(training.model_dir, config.model), config.model),
        load_tokenizer(training.model_dir),
        Rows(texts),
        ClaimOrder([len(texts)], len(texts), claim_samples or len(texts), shuffle=False),
        config,
        text_column="text",
        device=torch.device("cpu"),
        held_out=held_out,
        progress=progress,
    )


def claim_of(texts) -> Claim:
    return Claim(0, 0, 0, len(texts), 0, 0, "")


def weights_after(trainer, texts) -> dict[str, torch.Tensor]:
    list(trainer.train(claim_of(texts), lambda part, tokens: 1e-2))
    trainer.keep()
    return {name: tensor.clone() for name, tensor in trainer._kept.items()}


@pytest.mark.parametrize("chunk_size", [16, 40])
def test_long_documents_go_through_the_rollout_with_the_same_result(training, chunk_size):
    texts = [LONG, "a short one"]
    rolled = trainer_of(training, texts, rollout={"chunk_size": chunk_size, "use_chunked_training": True})
    sizes = [batch.input_ids.shape[1] for batch in rolled.batches(claim_of(texts))]
    assert max(sizes) > 150
    # The same batches, each in one ordinary pass.
    plain = trainer_of(training, texts, rollout={"chunk_size": chunk_size, "use_chunked_training": True})
    plain._is_rolled_out = lambda batch: False
    expected = weights_after(plain, texts)
    for name, value in weights_after(rolled, texts).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


def test_long_sequences_go_through_the_rollout_unasked(training, monkeypatch):
    rolled = []
    monkeypatch.setattr(ModelTrainer, "_roll_out", lambda self, inputs: rolled.append(inputs) or 0.5)
    trainer = trainer_of(training, [LONG, LONG], rollout={"chunk_size": 16}, data={"sequence_length": 64})
    steps = list(trainer.train(claim_of([LONG, LONG]), lambda part, tokens: 1e-2))
    assert len(rolled) == len(steps) > 0
    assert all(inputs["input_ids"].shape[1] <= 64 for inputs in rolled)


def test_whole_documents_end_where_the_positions_do(training):
    model = load_model(training.model_dir, training.config.model)
    model.config.max_position_embeddings = 50
    trainer = trainer_of(training, [LONG], model=model, rollout={"use_chunked_training": True})
    batches = trainer.batches(claim_of([LONG]))
    assert {batch.input_ids.shape[0] for batch in batches} == {1}
    assert max(batch.input_ids.shape[1] for batch in batches) == 50
    ids = [token for batch in batches for token in batch.input_ids[0].tolist()]
    tokenizer = load_tokenizer(training.model_dir)
    end = tokenizer.eos_token_id
    # The rest of the document, shorter than a sequence, comes first.
    assert sorted(token for token in ids if token != end) == sorted(tokenizer(LONG)["input_ids"])


@pytest.mark.parametrize("use", [False, "auto"])
def test_without_chunked_training_documents_are_cut(training, use):
    trainer = trainer_of(training, [LONG], rollout={"use_chunked_training": use})
    batches = trainer.batches(claim_of([LONG]))
    assert max(batch.input_ids.shape[1] for batch in batches) == 32
    documents = [token for batch in batches for row in batch.input_ids.tolist() for token in row]
    ids = load_tokenizer(training.model_dir)(LONG)["input_ids"]
    assert documents[: len(ids)] == ids


def test_dropout_depends_on_the_position_alone(training):
    texts = ["the list of a file"] * 4
    trainers = [trainer_of(training, texts) for _ in range(2)]
    for trainer in trainers:
        trainer._model.model.embed_tokens.register_forward_hook(
            lambda module, inputs, output: torch.nn.functional.dropout(output, 0.5)
        )
    first = weights_after(trainers[0], texts)
    torch.rand(3)
    second = weights_after(trainers[1], texts)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_claims_without_text_are_no_steps(training):
    texts = ["", ""]
    assert list(trainer_of(training, texts).train(claim_of(texts), lambda part, tokens: 1e-2)) == []


def test_a_loss_that_is_not_finite_names_the_rows(training):
    texts = ["the list of a file"] * 4
    trainer = trainer_of(training, texts)
    with torch.no_grad():
        trainer._parameters["model.norm.weight"].fill_(float("nan"))
    with pytest.raises(NonFiniteLoss, match=r"step 1 of position 0 \(block 0, rows 0 to 4\)"):
        list(trainer.train(claim_of(texts), lambda part, tokens: 1e-2))


def test_a_position_that_fails_again_and_again_ends_the_run_and_is_named(training, monkeypatch):
    training.start(rounds={"max_failures": 3, "seconds": 0.05})
    train = ModelTrainer.train

    def fail_at_five(self, claim, learning_rate):
        if claim.position == 5:
            raise NonFiniteLoss("as if")
        return train(self, claim, learning_rate)

    monkeypatch.setattr(ModelTrainer, "train", fail_at_five)
    for _ in range(3):
        with pytest.raises(NonFiniteLoss):
            training.work()
    span = ClaimOrder([40, 40, 10], 20, 5, seed=7).locate(5)
    place = rf"position 5 \(block {span.block_id}, rows {span.start} to {span.stop}\)"
    with pytest.raises(TrainingIncomplete, match=place):
        training.work()
    training.config = training.config.replace(rounds={"on_failure": "skip"})
    training.work()
    manifest = Lineage(training.store).newest().manifest
    assert manifest.final
    assert manifest.skipped == [(5, 6)]
    assert manifest.done == [(0, 5), (6, 18)]


def test_every_token_chunk_is_progress(training):
    calls = []
    texts = [LONG]
    seen = trainer_of(
        training,
        texts,
        progress=lambda: calls.append(1),
        rollout={"chunk_size": 16, "use_chunked_training": True},
    )
    steps = list(seen.train(claim_of(texts), lambda part, tokens: 1e-2))
    (batch,) = seen.batches(claim_of(texts))
    assert len(steps) == 1
    assert len(calls) >= batch.input_ids.shape[1] // 16
