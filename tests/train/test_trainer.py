"""From a claim to optimiser steps."""

import shutil
import threading
from collections import Counter
from contextlib import closing

import pytest
import torch

from metaflow_hf.data import BlockManager, process_raw_dataset_to_blocks
from metaflow_hf.data.formats import DetectedFormat
from metaflow_hf.data.ledger import Claim
from metaflow_hf.data.order import ClaimOrder
from metaflow_hf.errors import IntegrityError, NonFiniteLoss, TrainingIncomplete, UnsupportedModelError
from metaflow_hf.events import ClaimDone, StepDone
from metaflow_hf.train.encoding import example_encoder
from metaflow_hf.train.feed import Feed
from metaflow_hf.train.gradients import Gradients
from metaflow_hf.train.heldout import NOTHING_HELD_OUT, held_out, heldout_rows, training_samples
from metaflow_hf.train.isolation import require_isolation
from metaflow_hf.train.lineage import Lineage
from metaflow_hf.train.models import load_model, load_tokenizer, prepare
from metaflow_hf.train.trainer import ModelTrainer

TEXT = DetectedFormat("text", {"text": "text"})
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
    network=None,
    claim_samples=None,
    progress=lambda: None,
    held_out=NOTHING_HELD_OUT,
    **sections,
):
    config = training.config.replace(**sections)
    return ModelTrainer(
        prepare(network or load_model(training.model_dir, config.model), config.model),
        example_encoder(load_tokenizer(training.model_dir), TEXT, config),
        Rows(texts),
        ClaimOrder([len(texts)], len(texts), claim_samples or len(texts), shuffle=False),
        config,
        device=torch.device("cpu"),
        held_out=held_out,
        progress=progress,
    )


def claim_of(texts) -> Claim:
    return Claim(0, 0, 0, len(texts), 0, 0, "")


def weights_after(trainer, texts) -> dict[str, torch.Tensor]:
    list(trainer.train(claim_of(texts), lambda part, tokens: 1e-2))
    trainer.keep()
    return {name: tensor.clone() for name, tensor in trainer._engine.kept.items()}


@pytest.mark.parametrize("chunk_size", [16, 40])
def test_long_documents_go_through_the_rollout_with_the_same_result(training, chunk_size):
    texts = [LONG, "a short one"]
    rolled = trainer_of(training, texts, rollout={"chunk_size": chunk_size, "use_chunked_training": True})
    sizes = [batch.input_ids.shape[1] for batch in rolled.batches(claim_of(texts))]
    assert max(sizes) > 150
    # The same batches, each in one ordinary pass.
    plain = trainer_of(training, texts, rollout={"chunk_size": chunk_size, "use_chunked_training": True})
    plain._engine.gradients._is_rolled_out = lambda batch: False
    expected = weights_after(plain, texts)
    for name, value in weights_after(rolled, texts).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


def test_long_sequences_go_through_the_rollout_unasked(training, monkeypatch):
    rolled = []
    monkeypatch.setattr(
        Gradients, "_roll_out", lambda self, inputs, divisor: rolled.append(inputs) or torch.tensor(0.5)
    )
    trainer = trainer_of(training, [LONG, LONG], rollout={"chunk_size": 16}, data={"sequence_length": 64})
    steps = list(trainer.train(claim_of([LONG, LONG]), lambda part, tokens: 1e-2))
    assert len(rolled) == len(steps) > 0
    assert all(inputs["input_ids"].shape[1] <= 64 for inputs in rolled)


def test_whole_documents_end_where_the_positions_do(training):
    model = load_model(training.model_dir, training.config.model)
    model.config.max_position_embeddings = 50
    trainer = trainer_of(training, [LONG], network=model, rollout={"use_chunked_training": True})
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
        trainer._engine.model.model.embed_tokens.register_forward_hook(
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
        trainer._engine.parameters["model.norm.weight"].fill_(float("nan"))
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


TEXTS = [f"the value of a file {number} is not the name of it" for number in range(12)]


def claims_of(count: int, size: int) -> list[Claim]:
    return [Claim(0, 0, p * size, (p + 1) * size, 0, p, "") for p in range(count)]


def losses_of(trainer: ModelTrainer, claims: list[Claim]) -> list[float]:
    return [step.loss for claim in claims for step in trainer.train(claim, lambda part, tokens: 1e-2)]


def prefetching() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_what_is_made_ahead_of_time_changes_no_loss(training):
    claims = claims_of(4, 3)
    plain = losses_of(trainer_of(training, TEXTS, claim_samples=3), claims)
    # Right guesses, wrong ones, none, and one that is right but comes twice.
    guesses = iter([claims[1], claims[3], None, claims[0]])
    with closing(trainer_of(training, TEXTS, claim_samples=3)) as trainer:
        trainer.foresee = lambda: next(guesses)
        assert losses_of(trainer, claims) == plain
    assert not prefetching()


def test_the_next_claim_is_read_while_this_one_is_trained(training):
    claims = claims_of(2, 3)
    with closing(trainer_of(training, TEXTS, claim_samples=3)) as trainer:
        rows, was_read = trainer._feed._rows, threading.Event()
        plain_read = rows.read_rows

        def read_rows(block_id, start, stop):
            assert threading.current_thread().name == ("prefetch" if start == 3 else "MainThread")
            if start == 3:
                was_read.set()
            return plain_read(block_id, start, stop)

        rows.read_rows = read_rows
        trainer.foresee = lambda: claims[1]
        steps = trainer.train(claims[0], lambda part, tokens: 1e-2)
        next(steps)
        assert was_read.wait(60), "before the claim is asked for"
        assert losses_of(trainer, claims[1:])


def test_an_error_ahead_of_time_is_raised_by_the_claim_that_it_belongs_to(training):
    claims = claims_of(3, 3)
    with closing(trainer_of(training, TEXTS, claim_samples=3)) as trainer:
        rows = trainer._feed._rows
        plain_read = rows.read_rows

        def read_rows(block_id, start, stop):
            if start == 3:
                raise IntegrityError("block_00000.jsonl is damaged")
            return plain_read(block_id, start, stop)

        rows.read_rows = read_rows
        following = iter([claims[1], None, claims[1], None])
        trainer.foresee = lambda: next(following)
        assert losses_of(trainer, claims[:1])
        with pytest.raises(IntegrityError, match="damaged") as caught:
            losses_of(trainer, claims[1:2])
        assert "read_rows" in [entry.name for entry in caught.traceback], "where it comes from is told"
        # The claim after it, which nobody foresaw; what is foreseen and never asked for is no error.
        assert losses_of(trainer, claims[2:])
    assert not prefetching()


def test_a_worker_that_stops_or_fails_leaves_no_thread_behind(training, monkeypatch):
    training.start()
    stop = threading.Event()
    with pytest.raises(TrainingIncomplete, match="told to stop"):
        training.work(stop=stop, on_event=lambda event: stop.set())
    assert not prefetching()
    monkeypatch.setattr(ModelTrainer, "_step", lambda self, batches, rate: (float("nan"), 1.0))
    with pytest.raises(NonFiniteLoss, match="Its tokens are kept in "):
        training.work()
    assert not prefetching()
    assert len(training.store.children("nonfinite")) == 1


def test_a_worker_alone_foresees_every_claim_but_the_first(training, monkeypatch):
    made = Counter()
    prepare = Feed._prepare

    def count(self, claim):
        made[threading.current_thread().name] += 1
        return prepare(self, claim)

    monkeypatch.setattr(Feed, "_prepare", count)
    training.start(rounds={"seconds": 0.05})
    training.work()
    assert made["MainThread"] == 1
    assert made["prefetch"] == 17


def test_what_is_counted_is_recorded_and_trained(training):
    """Labels in the batches = tokens of steps, claims and rounds = tokens in the model."""
    events = []
    training.start(data={"packing": False, "long_documents": "truncate", "epochs": 2})
    training.work(on_event=events.append)
    with training.blocks() as blocks:
        order = ClaimOrder([40, 40, 10], 20, 5, seed=7, epochs=2)
        encoder = example_encoder(load_tokenizer(training.model_dir), TEXT, training.config)
        feed = Feed(blocks, order, encoder, training.config)
        spans = map(order.locate, range(order.num_positions))
        claims = [Claim(s.block_id, s.chunk_id, s.start, s.stop, s.epoch, s.position, "") for s in spans]
        expected = {claim.position: sum(batch.num_tokens for batch in feed.take(claim)) for claim in claims}
        assert feed.left_out.documents > 0
    found = {event.position: event.tokens for event in events if isinstance(event, ClaimDone)}
    assert found == expected
    assert sum(event.tokens for event in events if isinstance(event, StepDone)) == sum(expected.values())
    assert Lineage(training.store).newest().manifest.tokens == sum(expected.values())


@pytest.mark.parametrize(("policy", "kept"), [("truncate", [50]), ("drop", []), ("split", [50])])
def test_policies_hold_where_the_positions_end(training, policy, kept):
    model = load_model(training.model_dir, training.config.model)
    model.config.max_position_embeddings = 50
    trainer = trainer_of(
        training,
        [LONG, "a short one"],
        network=model,
        rollout={"use_chunked_training": True},
        data={"long_documents": policy},
    )
    batches = trainer.batches(claim_of([LONG, "a short one"]))
    sizes = [batch.input_ids.shape[1] for batch in batches if batch.is_long]
    assert sizes[:1] == kept
    assert (len(sizes) > 1) == (policy == "split")
    assert trainer._feed.left_out.documents == 0, "counted when it is taken"


def test_isolated_documents_go_through_the_rollout_with_the_same_result(training):
    sections = {"data": {"packing": "isolated"}, "rollout": {"chunk_size": 16}}
    rolled, plain = (trainer_of(training, TEXTS, **sections) for _ in range(2))
    assert max(batch.input_ids.shape[1] for batch in rolled.batches(claim_of(TEXTS))) > 16
    plain._engine.gradients._is_rolled_out = lambda batch: False
    expected = weights_after(plain, TEXTS)
    for name, value in weights_after(rolled, TEXTS).items():
        # A tenth of a step: Adam makes steps of any gradient, also of one that is nothing but rounding.
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-3)


def test_models_that_cannot_be_rolled_out_are_trained_whole_unless_told_otherwise(training, caplog):
    model = load_model(training.model_dir, training.config.model)
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    sections = {"network": model, "data": {"sequence_length": 64}}
    asked = trainer_of(training, [LONG], rollout={"chunk_size": 16, "use_chunked_training": True}, **sections)
    with pytest.raises(UnsupportedModelError, match="rope of type dynamic"):
        weights_after(asked, [LONG])
    unasked = trainer_of(training, [LONG], rollout={"chunk_size": 16}, **sections)
    assert all(loss > 0 for loss in losses_of(unasked, [claim_of([LONG])]))
    assert "trained whole (rollout.use_chunked_training: auto): llama" in caplog.text


def test_models_that_let_packed_documents_see_each_other_are_refused():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        )
    )
    require_isolation(model)
    plain = model.forward
    model.forward = lambda input_ids, position_ids, use_cache: plain(input_ids=input_ids)
    with pytest.raises(UnsupportedModelError, match="set data.packing to true"):
        require_isolation(model)
    model.forward = lambda input_ids, use_cache: plain(input_ids=input_ids)
    with pytest.raises(UnsupportedModelError, match="takes no positions"):
        require_isolation(model)


def test_a_text_and_its_copies_are_on_one_side_and_every_row_is_on_one(training, tmp_path):
    unique = [f"text number {number} of the file" for number in range(60)]
    rows = [*unique, *unique[::2], *unique[::3]]
    (tmp_path / "raw.txt").write_text("".join(f"{row}\n" for row in rows))
    process_raw_dataset_to_blocks(tmp_path / "raw.txt", tmp_path / "blocks", "copies", block_size=7)
    config = training.config.replace(data={"heldout_samples": 20, "evaluation_dataset": None})
    with BlockManager(tmp_path / "blocks", dataset_chunk_size=5) as blocks:
        measured = [row.value for row in heldout_rows(blocks, config)]
        order = ClaimOrder(
            training_samples([block.sample_count for block in blocks.manifest.blocks], config), 5, 5, seed=7
        )
        feed = Feed(
            blocks,
            order,
            example_encoder(tokenizer := load_tokenizer(training.model_dir), TEXT, config),
            config,
            held_out=held_out(blocks, None, config),
        )
        tokens = []
        for position in range(order.num_positions):
            span = order.locate(position)
            claim = Claim(span.block_id, span.chunk_id, span.start, span.stop, 0, position, "")
            for batch in feed.take(claim):
                tokens += batch.input_ids[batch.attention_mask.bool()].tolist()
    trained = tokenizer.decode(tokens).split(tokenizer.eos_token)[:-1]
    assert len(measured) == len(set(measured)) > 5
    assert sorted(trained) == sorted(row for row in rows if row not in measured)


@pytest.fixture
def larger_tokenizer(training, tmp_path):
    """A tokenizer with two tokens more than the model has embeddings for, one of which pads."""
    directory = shutil.copytree(training.model_dir, tmp_path / "larger")
    tokenizer = load_tokenizer(directory)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens(["<|call|>"])
    tokenizer.save_pretrained(directory)
    training.model_dir = directory
    return tokenizer


def test_a_padding_token_that_the_model_does_not_know_is_not_needed(training, larger_tokenizer):
    trainer = trainer_of(training, ["a list of the names", "a file"], data={"packing": False})
    known = trainer._engine.model.get_input_embeddings().weight.shape[0]
    assert larger_tokenizer.pad_token_id >= known
    (step,) = trainer.train(claim_of("ab"), lambda part, tokens: 1e-2)
    assert step.tokens > 0


def test_a_token_that_the_model_does_not_know_is_named(training, larger_tokenizer):
    trainer = trainer_of(training, ["a list of the names", "a <|call|> of a file"])
    with pytest.raises(UnsupportedModelError, match=r"the token '<\|call\|>' \(number \d+\)"):
        list(trainer.train(claim_of("ab"), lambda part, tokens: 1e-2))
