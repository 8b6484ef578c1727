"""What may join a lineage and what may not."""

import shutil
import threading

import pytest

from metaflow_hf.errors import ConfigError, LineageMismatch, TrainingIncomplete
from metaflow_hf.train.lineage import Lineage
from metaflow_hf.train.spec import training_samples


def test_another_configuration_is_refused_with_every_difference(training):
    training.start()
    training.config = training.config.replace(
        optimizer={"learning_rate": 0.5}, data={"sequence_length": 64}, rounds={"max_tokens": 5000}
    )
    with pytest.raises(LineageMismatch) as error:
        training.work()
    message = str(error.value)
    assert "optimizer.learning_rate: 0.01 in the lineage, 0.5 here" in message
    assert "data.sequence_length: 32 in the lineage, 64 here" in message
    assert "rounds.max_tokens: None in the lineage, 5000 here" in message
    assert "weight_decay" not in message
    with pytest.raises(LineageMismatch):
        training.start()


def test_another_dataset_is_refused(training, tmp_path):
    from metaflow_hf.data import process_raw_dataset_to_blocks

    training.start()
    (tmp_path / "other.txt").write_text("one line\n" * 100, "utf-8")
    process_raw_dataset_to_blocks(tmp_path / "other.txt", tmp_path / "other", "words", block_size=40)
    training.dataset_dir = tmp_path / "other"
    with pytest.raises(LineageMismatch, match=r"dataset\.digest"):
        training.work()


def test_what_does_not_change_the_mathematics_may_differ(training):
    training.start()
    training.start(
        rounds={"workers": 4, "seconds": 5.0, "keep": "recent", "max_failures": 2, "claim_samples": "auto"},
        report={"interval_seconds": 1.0},
    )
    training.work()
    assert Lineage(training.store).newest().manifest.final


def test_starting_is_idempotent_and_safe_by_many(training):
    specs = []
    threads = [threading.Thread(target=lambda: specs.append(training.start())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lineage = Lineage(training.store)
    assert len(specs) == 4
    assert all(spec == lineage.spec() for spec in specs)
    assert lineage.newest().number == 0
    assert lineage.round(0).manifest.weights == lineage.spec().initial_weights


def test_auto_gives_each_worker_claims_enough_and_divides_the_chunk(training):
    spec = training.start(rounds={"claim_samples": "auto"}, data={"epochs": 20})
    assert spec.order["claim_samples"] == 10
    assert spec.num_positions == 180


def test_a_claim_that_does_not_divide_a_chunk_is_refused(training):
    with pytest.raises(ConfigError, match=r"claim_samples = 7 does not divide .* nearest that does is 5"):
        training.start(rounds={"claim_samples": 7})


def test_held_out_and_surplus_rows_are_not_trained(training):
    assert training_samples([40, 40, 20], training.config) == [40, 40, 10]
    limited = training.config.replace(data={"max_samples": 60})
    assert training_samples([40, 40, 20], limited) == [40, 10, 0]
    assert training_samples([40, 40, 20], training.config.replace(data={"evaluation_dataset": "x"})) == [
        40,
        40,
        20,
    ]
    with pytest.raises(ConfigError, match="nothing is left"):
        training_samples([5], training.config)


def test_a_lineage_that_was_never_started_is_named(training):
    with pytest.raises(TrainingIncomplete, match="there is no lineage at"):
        training.work()


@pytest.mark.parametrize("changed", ["tokenizer.json", "model.safetensors"])
def test_another_tokenizer_or_other_frozen_weights_are_refused(training, tmp_path, changed):
    lora = {"lora": {"rank": 2}} if changed == "model.safetensors" else {}
    training.start(model=lora)
    other = tmp_path / "other"
    shutil.copytree(training.model_dir, other)
    content = (other / changed).read_bytes()
    # The last byte of a value, so that both stay readable.
    (other / changed).write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if lora else content + b"\n")
    training.model_dir = other
    with pytest.raises(LineageMismatch, match=r"model\.(tokenizer|base)"):
        training.work()


def test_a_later_start_takes_what_auto_was_resolved_to(training):
    first = training.start(rounds={"claim_samples": 4})
    training.config = training.config.replace(rounds={"claim_samples": "auto", "workers": 64})
    assert training.start() == first
