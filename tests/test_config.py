"""The configuration: what is accepted, and what is said about everything else."""

from pathlib import Path

import pytest

from metaflow_hf.config import TrainConfig, load_config, parse_yaml
from metaflow_hf.errors import ConfigError

CONFIGS = Path(__file__).parent.parent / "configs"

SEED = """
# In training config
samples_per_block: 100000   # Samples per downloaded block
dataset_chunk_size: 4000    # Samples loaded into RAM at once

# Recommendations by RAM:
# - 16GB RAM: chunk_size=2000-3000
# - 32GB RAM: chunk_size=4000 (default)
# - 64GB+ RAM: chunk_size=8000+
"""
SEED_LONG = """
use_chunked_training: true  # Enable for long sequences
chunk_size: 2048           # Tokens per GPU chunk
"""


def mistakes(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        TrainConfig.parse(parse_yaml(text))
    return [line.strip() for line in str(caught.value).splitlines()]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_configuration_loads(path: Path):
    config = load_config(path)
    assert config.model.name
    assert config.data.title
    # What Metaflow hands to remote tasks is the same thing as JSON.
    assert TrainConfig.parse(config.model_dump(mode="json")) == config


def test_the_flat_spelling_lands_in_its_sections():
    config = TrainConfig.parse(parse_yaml(SEED + SEED_LONG))
    assert config.data.samples_per_block == 100_000
    assert config.data.dataset_chunk_size == 4_000
    assert config.rollout.use_chunked_training is True
    assert config.rollout.chunk_size == 2_048


def test_a_key_in_both_places_is_a_mistake():
    assert mistakes("chunk_size: 1\nrollout: {chunk_size: 2}") == [
        "configuration: 1 mistake",
        "chunk_size: given at the top level and as rollout.chunk_size; keep one of them",
    ]


def test_all_mistakes_are_listed_with_path_value_and_nearest_spelling():
    text = """
    modle: {repo_id: x}
    model: {repo_idd: x, dtype: floot32}
    data: {batch_size: -1, dataset_chunk_size: atuo, dataset: 3}
    optimizer: {schedule: cosin, betas: [0.9, 2], learning_rate: .inf}
    rounds: 5
    learning_rate: 1e-3
    hub: huggingface
    """
    assert mistakes(text) == [
        "configuration: 12 mistakes",
        "hub: must be 'embedded' or the URL of a hub (http://… or https://…), got 'huggingface'",
        "model.dtype: must be 'auto' or 'float32' or 'bfloat16' or 'float16', got 'floot32'; did you mean 'float32'?",
        "model.repo_idd: unknown key; did you mean 'repo_id'?",
        "data.dataset: must be text or null, got 3",
        "data.dataset_chunk_size: must be a whole number or 'auto', got 'atuo'; did you mean 'auto'?",
        "data.batch_size: must be a whole number (greater than 0), got -1",
        "optimizer.learning_rate: must be a number, got inf",
        "optimizer.betas.1: must be a number (less than 1), got 2",
        "optimizer.schedule: must be 'cosine' or 'linear' or 'constant' or 'wsd', got 'cosin'; did you mean 'cosine'?",
        "rounds: must be a section, got 5",
        "modle: unknown key; did you mean 'model'?",
        "learning_rate: unknown key here; did you mean 'optimizer.learning_rate'?",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "line 1, column 5: not readable as YAML"),
        ("- model", "expected sections"),
        ("", "my.yaml: is empty; expected sections"),
    ],
)
def test_what_is_not_a_configuration_says_so(text: str, said: str):
    with pytest.raises(ConfigError, match=said):
        parse_yaml(text, where="my.yaml")


def test_what_was_meant_is_said_as_one_would_write_it():
    text = """
    model: {lora: true, compile: null}
    data: {packing: "yes"}
    optimizer: {betas: [0.9]}
    evaluation: {model: best}
    report: {trackers: wandb}
    micro_batch_size: 4
    """
    assert mistakes(text) == [
        "configuration: 7 mistakes",
        "model.lora: must be a section or null, got true; for its defaults write {}",
        "model.compile: must be true or false, got null",
        "data.packing: must be true or false or 'isolated', got 'yes'",
        "optimizer.betas: must be a list of 2 values, each a number, got [0.9]",
        "evaluation: model: best needs every_rounds: after how many rounds the held-out loss is measured",
        "report.trackers: must be a list of 'tensorboard' or 'trackio' or 'wandb' or 'mlflow', got 'wandb'; did you mean "
        "['wandb']?",
        "micro_batch_size: unknown key here; did you mean 'data.batch_size'?",
    ]


def test_a_missing_file_is_one_line(tmp_path: Path):
    with pytest.raises(ConfigError, match="none.yaml cannot be read"):
        load_config(tmp_path / "none.yaml")


def test_numbers_in_scientific_notation_are_numbers():
    assert parse_yaml("a: 2e-4\nb: 1E5\nc: -3e2\nd: '2e-4'") == {
        "a": 2e-4,
        "b": 1e5,
        "c": -300.0,
        "d": "2e-4",
    }


def test_an_average_can_be_the_model_only_where_one_is_kept():
    with pytest.raises(ConfigError, match=r"evaluation: model: ema needs rounds\.ema_half_life"):
        TrainConfig.parse({"evaluation": {"model": "ema"}})
    TrainConfig.parse({"evaluation": {"model": "ema"}, "rounds": {"ema_half_life": 1000}})


def test_replace_validates_and_keeps_the_rest():
    config = TrainConfig.parse({"model": {"repo_id": "a/b"}, "rounds": {"workers": 3}})
    changed = config.replace(model={"repo_id": "c/d"})
    assert (changed.model.repo_id, changed.rounds.workers) == ("c/d", 3)
    with pytest.raises(ConfigError, match="rounds.workers"):
        config.replace(rounds={"workers": -1})


def test_it_is_frozen():
    config = TrainConfig.parse({})
    with pytest.raises(ValueError, match="frozen"):
        config.hub = "embedded"


def test_a_section_with_nothing_but_comments_is_empty():
    assert TrainConfig.parse(parse_yaml("data:\n  # later\nchunk_size: 8")).rollout.chunk_size == 8
    assert TrainConfig.parse(parse_yaml("data:\nsamples_per_block: 9")).data.samples_per_block == 9


def test_code_of_others_only_at_a_pinned_commit():
    said = "a full commit hash"
    assert any(said in line for line in mistakes("model: {repo_id: a/b, trust_remote_code: true}"))
    pinned = TrainConfig.parse({"model": {"repo_id": "a/b", "trust_remote_code": True, "revision": "a" * 40}})
    assert pinned.model.trust_remote_code


@pytest.mark.parametrize(
    "text", ["data: {seed: 1099511627776}", "data: {sequence_length: 1}", "optimizer: {betas: [0.9, 1.0]}"]
)
def test_values_that_torch_would_refuse_later_are_refused_now(text: str):
    assert len(mistakes(text)) == 2


@pytest.mark.parametrize(
    ("values", "gpus"),
    [
        ({}, 1),
        ({"rounds": {"gpus_per_worker": 8}}, 8),
        ({"rounds": {"gpus_per_worker": 8}, "resources": {"cpu": 16}}, 8),
        ({"rounds": {"gpus_per_worker": 8}, "resources": {"gpu": 4}}, 4),
    ],
)
def test_a_branch_of_several_processes_gets_a_gpu_for_each(values, gpus):
    assert TrainConfig.parse(values).resources.gpu == gpus


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (
            "datasets: [{dataset: a, weight: 0}]",
            "data.datasets[0].weight: must be a number or null (greater than 0), got 0",
        ),
        (
            "datasets: [{dataset: a}, {dataset: b, weigth: 1}]",
            "data.datasets[1].weigth: unknown key; did you mean 'weight'?",
        ),
        ("datasets: [{dataset: a, weight: 1}, {dataset: b}]", "data.datasets[1] has none"),
        (
            "datasets: [{dataset: 'hf://a/b'}, {dataset: 'hf://a/b@v2'}]",
            "data.datasets[1] has the same dataset as data.datasets[0]",
        ),
        (
            "datasets: [{dataset: x/a}, {dataset: y/a}]",
            "data.datasets[1] has the same name as data.datasets[0], 'a'",
        ),
        ("datasets: [{dataset: a, name: ''}]", "data.datasets[0].name"),
        ("datasets: [{name: a}]", "data.datasets[0].dataset: is required"),
        ("dataset: a, datasets: [{dataset: b}]", "data: dataset and datasets both say what is trained"),
        ("max_samples: 5, datasets: [{dataset: b}]", "data: max_samples limits one dataset"),
        ("format: alpaca, datasets: [{dataset: b}]", "data: format describes the rows of one dataset"),
        (
            "datasets: [{dataset: a, columns: {text: b}, text_column: c}]",
            "data.datasets[0]: text_column and columns",
        ),
    ],
)
def test_mistakes_in_a_mixture_are_told_with_their_place(data: str, said: str):
    with pytest.raises(ConfigError) as caught:
        TrainConfig.parse(parse_yaml(f"data: {{{data}}}"))
    assert said in str(caught.value)


def test_a_dataset_of_a_mixture_has_a_name_and_settings_of_its_own():
    datasets = "[{dataset: 'hf://a/b:en@v1', epochs: 2}, {dataset: rows/x.jsonl, name: mine, text_column: t}]"
    data = TrainConfig.parse(parse_yaml(f"data: {{epochs: 3, datasets: {datasets}}}")).data
    assert [one.title for one in data.datasets] == ["a/b:en", "mine"]
    assert data.title == "a/b:en, mine"
    first, second = data.only(0), data.only(1)
    assert (first.dataset, first.epochs, first.datasets) == ("hf://a/b:en@v1", 2, [])
    assert (second.epochs, second.text_column) == (3, "t")
