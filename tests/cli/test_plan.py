"""``metaflow hf validate | plan | preview``: each configuration, before anything is run."""

import json
import re
from pathlib import Path

import pytest
from metaflow._vendor.click.testing import CliRunner
from stand_ins import stand_in_hub
from transformers import AutoTokenizer

from metaflow_hf.config import load_config
from metaflow_hf.data import build_blocks
from metaflow_hf.store import configured_store, datastore
from metaflow_hf.store.models import save_directory
from metaflow_hf.train.dry_run import DryRun
from metaflow_hf_cli.group import hf

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = sorted(path.name for path in CONFIGS.glob("*.yaml"))


@pytest.fixture
def place(start_hub, tmp_path: Path, monkeypatch) -> Path:
    """An empty directory with the stand-ins of what the configurations name."""
    start_hub(stand_in_hub())
    directory = tmp_path / "project"
    directory.mkdir()
    monkeypatch.chdir(directory)
    # As in a shell, where no task of a flow says which datastore it uses.
    local = ("local", str(directory / ".metaflow"))
    monkeypatch.setattr(datastore, "_configured_datastore", lambda *, create=True: local)
    return directory


def call(*arguments: object, status: int = 0) -> str:
    done = CliRunner(mix_stderr=False).invoke(hf, [*map(str, arguments)])
    assert done.exit_code == status, f"{done.stdout}{done.stderr}"
    return done.stdout if status == 0 else done.stderr


def everything_below(directory: Path) -> set[str]:
    """All but what the libraries of the hub remember in a cache of their own."""
    found = {str(path.relative_to(directory)) for path in directory.rglob("*")}
    return {path for path in found if not path.startswith("hf-home")}


def trained_model(tmp_path: Path) -> str:
    """What another flow saved: its key."""
    from stand_ins import _model

    source = tmp_path / "trained"
    source.mkdir()
    for name, data in _model().items():
        (source / name).write_bytes(data)
    return save_directory(configured_store(), source, flow="TrainFlow", run="17", step="merge", task="5").key


@pytest.mark.parametrize("name", [name for name in NAMES if name != "demo.yaml"])
def test_each_configuration_is_planned_and_nothing_is_written(name: str, place: Path, tmp_path: Path):
    config = load_config(CONFIGS / name)
    options: list[object] = ["--tokens-per-second", 1_000_000]
    if config.model.reference:
        options += ["--reference", trained_model(tmp_path)]
    before = everything_below(tmp_path)
    answer = json.loads(call("plan", CONFIGS / name, *options, "--json"))
    assert everything_below(tmp_path) == before
    plan = answer["plan"]
    assert plan["tokens"] > 0
    assert plan["seconds"] > 0
    assert plan["memory"]["activations"] > 0
    assert plan["memory_bytes"] == sum(plan["memory"].values())
    assert {"model", "dataset", "rounds", "result"} <= plan["disk"].keys()
    assert (plan["trainable_parameters"] < plan["parameters"]) == (config.model.lora is not None)
    if name == "pretrain_small.yaml":
        assert plan["parameters"] > 10_000_000
    # Of the mixture: all instructions, and as many of the others as their weights ask for.
    rows = {"chat.yaml": 100, "mixture.yaml": 800}.get(name, 400)
    counted = answer["rows"]
    assert counted["total"] == pytest.approx(rows, abs=30)
    held_out = 0 if config.data.evaluation_dataset else counted["held_out"]
    assert counted["trained"] + held_out + sum(counted["skipped"].values()) == counted["total"]
    assert answer["format"] == {"chat.yaml": "messages", "mixture.yaml": "mixture"}.get(name, "text")
    assert 0 < answer["labelled_fraction"] <= 1
    assert answer["batch_sequences"] > 0


def test_a_plan_tells_rows_tokens_and_shares_of_a_mixture(place: Path):
    arguments = ("plan", CONFIGS / "mixture.yaml", "--tokens-per-second", 1_000_000)
    answer = json.loads(call(*arguments, "--json"))
    datasets = answer["datasets"]
    assert [one["name"] for one in datasets] == ["instructions", "conversations", "stories"]
    assert [one["share"] for one in datasets] == pytest.approx([0.5, 0.3, 0.2], abs=0.005)
    assert sum(one["tokens"] for one in datasets) == pytest.approx(answer["tokens"], abs=3)
    assert sum(one["rows"] for one in datasets) == pytest.approx(answer["rows"]["trained"], abs=3)
    # With a budget of half the tokens half the rows are trained, of each dataset.
    half = json.loads(call(*arguments, "--max_tokens", answer["tokens"] // 2, "--json"))["datasets"]
    for one, less in zip(datasets, half, strict=True):
        assert less["rows"] == pytest.approx(one["rows"] / 2, abs=1)
        assert less["share"] == one["share"]
    text = call(*arguments)
    assert re.search(r"^  instructions +\d+ +50.0 % +[\d,]+$", text, re.MULTILINE)
    said = " ".join(text.split())
    assert "the mixture ends when instructions has run out (its 400 rows)" in said
    assert "240 % of conversations and 40 % of stories" in said


@pytest.mark.parametrize(
    ("datasets", "said"),
    [
        ("[{dataset: 'hf://a/b', format: alpacca}]", "dataset 'a/b'"),
        (
            "[{dataset: 'hf://roneneldan/TinyStories', format: alpacca}]",
            "data.datasets[0] (roneneldan/TinyStories): ",
        ),
        (
            "[{dataset: 'hf://roneneldan/TinyStories'}, {dataset: 'hf://roneneldan/TinyStories:default:train'}]",
            "data.datasets[1]: hf://roneneldan/TinyStories:default:train is the same dataset as data.datasets[0]",
        ),
        (
            "[{dataset: 'hf://yahma/alpaca-cleaned'}], evaluation_dataset: 'hf://yahma/alpaca-cleaned:default:train'",
            "is what data.datasets[0], hf://yahma/alpaca-cleaned, trains on",
        ),
        (
            "[{dataset: 'hf://roneneldan/TinyStories', text_column: prose}]",
            "data.datasets[0] (roneneldan/TinyStories): ",
        ),
    ],
)
def test_a_mistake_in_a_mixture_is_told_with_its_dataset(place: Path, datasets: str, said: str):
    (place / "mine.yaml").write_text(f"model: {{repo_id: gpt2}}\ndata: {{datasets: {datasets}}}\n")
    assert said in call("plan", "mine.yaml", status=1)


def test_the_preview_of_a_mixture_names_the_dataset(place: Path):
    found = [call("preview", CONFIGS / "mixture.yaml", "--position", position) for position in range(4)]
    assert all(text.startswith("format mixture of alpaca (") for text in found)
    names = {text.partition("; ")[2].partition(", block 0, rows ")[0] for text in found}
    assert names == {"instructions", "conversations", "stories"}


def test_a_dataset_as_a_parameter_replaces_a_mixture(place: Path):
    arguments = ("--dataset", "hf://roneneldan/TinyStories", "--tokens-per-second", 1_000_000, "--json")
    answer = json.loads(call("plan", CONFIGS / "mixture.yaml", *arguments))
    assert answer["datasets"] == []
    assert answer["format"] == "text"


def test_a_plan_tells_steps_time_and_settings(place: Path, tmp_path: Path):
    (place / "mine.yaml").write_text(
        "model: {repo_id: gpt2}\n"
        "data: {dataset: 'hf://roneneldan/TinyStories', heldout_samples: 40, sequence_length: 32, batch_size: 2}\n"
        "optimizer: {gradient_accumulation_steps: 3}\n"
        "rounds: {claim_samples: 20}\n"
        "dataset_chunk_size: 20\n"
        "chunk_size: 512\n"
    )
    text = call("plan", "mine.yaml", "--max_tokens", 3840, "--num_gpus", 2)
    assert re.search(r"about \d+ of 6 sequences x 32 tokens", text)
    assert "activations" in text
    # It was tried on this machine.
    assert re.search(r"^  time +about ", text, re.MULTILINE)
    assert re.search(r"rollout.chunk_size +512  \(mine.yaml\)", text)
    assert re.search(r"rounds.max_tokens +3840  \(parameter\)", text)
    assert "roneneldan/TinyStories @ " in text
    assert "optimizer.eps" not in text


def test_the_preview_is_what_a_worker_would_train(place: Path, hub_environment):
    (place / "mine.yaml").write_text(
        "model: {repo_id: HuggingFaceTB/SmolLM2-135M-Instruct}\n"
        "data: {dataset: 'hf://HuggingFaceTB/smoltalk:everyday-conversations', heldout_samples: 10,\n"
        "  sequence_length: 128, batch_size: 2, dataset_chunk_size: 20, samples_per_block: 40}\n"
        "rounds: {claim_samples: 5}\n"
    )
    first = json.loads(call("preview", "mine.yaml", "--position", 3, "--json"))
    assert not (place / ".metaflow").exists()
    # A dataset that is built is read from there, and gives the same.
    build_blocks(
        "hf://HuggingFaceTB/smoltalk:everyday-conversations",
        place / ".metaflow/mf.hf/datasets/built",
        samples_per_block=40,
    )
    (place / "mine.yaml").write_text(
        (place / "mine.yaml")
        .read_text()
        .replace("hf://HuggingFaceTB/smoltalk:everyday-conversations", "datasets/built")
    )
    assert json.loads(call("preview", "mine.yaml", "--position", 3, "--json")) == first
    text = call("preview", "mine.yaml", "--position", 3)
    assert "⟦<|im_start|>user\nSay " in text
    assert f"block {first['block_id']}, rows {first['rows'][0]} to {first['rows'][1] - 1}: batch 0 of" in text
    said = "no position 999"
    assert said in call("preview", "mine.yaml", "--position", 999, status=1)
    assert "there is no batch 77" in call("preview", "mine.yaml", "--batch", 77, status=1)


def test_the_tokens_of_a_preview_are_those_of_the_training(place: Path, tmp_path: Path, monkeypatch):
    """The first step of a worker takes the batch that the preview showed."""
    from metaflow_hf.config import parse_yaml
    from metaflow_hf.train.gradients import Gradients
    from metaflow_hf.train.job import TrainingJob

    source = "data: {dataset: 'hf://roneneldan/TinyStories', heldout_samples: 40, sequence_length: 64, batch_size: 2}\n"
    text = f"model: {{repo_id: gpt2}}\n{source}rounds: {{claim_samples: 5, max_tokens: 500}}\ndataset_chunk_size: 20\n"
    (place / "mine.yaml").write_text(text)
    shown = json.loads(call("preview", "mine.yaml", "--json"))
    trained = []
    add = Gradients.add
    monkeypatch.setattr(
        Gradients,
        "add",
        lambda self, batches, **kwargs: trained.extend(batches) or add(self, batches, **kwargs),
    )
    from metaflow_hf.hub import snapshot_download

    model_dir = snapshot_download("gpt2", local_dir=str(tmp_path / "gpt2"))
    monkeypatch.setattr(datastore, "_active", ("local", str(place / ".metaflow")))
    job = TrainingJob.configured(parse_yaml(text), run="F-1").build()
    job.begin(model_dir, {})
    job.work(model_dir, branch=0, write=lambda _: None)
    first = trained[0]
    expected = [
        ids[mask.bool()].tolist() for ids, mask in zip(first.input_ids, first.attention_mask, strict=True)
    ]
    assert [[piece["token"] for piece in sequence] for sequence in shown["sequences"]] == expected
    assert AutoTokenizer.from_pretrained(model_dir).decode(expected[0])[:20]


def test_all_mistakes_of_a_file_are_said_at_once_and_no_hub_is_asked(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    file = tmp_path / "wrong.yaml"
    file.write_text("model: {repo: gpt2, dtype: fp16}\noptimiser: {}\nrounds: {workers: 0}\n")
    said = call("validate", file, status=1)
    assert "wrong.yaml: 4 mistakes" in said
    for line in (
        "model.dtype: must be 'auto' or 'float32' or 'bfloat16' or 'float16', got 'fp16'; did you mean 'float16'?",
        "model.repo: unknown key; did you mean 'repo_id'?",
        "rounds.workers: must be a whole number (greater than 0), got 0",
        "optimiser: unknown key; did you mean 'optimizer'?",
    ):
        assert line in said
    assert "line 1, column 10" in call("validate", write(tmp_path, "model: [1"), status=1)
    assert "model.repo_id is required" in call("validate", write(tmp_path, "data: {dataset: x}"), status=1)


def write(directory: Path, text: str) -> Path:
    path = directory / "short.yaml"
    path.write_text(text)
    return path


def test_a_valid_file_is_shown_with_where_each_value_comes_from(tmp_path: Path):
    file = write(tmp_path, "model: {repo_id: gpt2}\ndata: {dataset: x}\nchunk_size: 512\n")
    found = {one["path"]: one for one in json.loads(call("validate", file, "--max_tokens", 7, "--json"))}
    assert found["model.repo_id"] == {"path": "model.repo_id", "value": "gpt2", "source": "short.yaml"}
    assert found["rollout.chunk_size"]["source"] == "short.yaml"
    assert found["rounds.max_tokens"] == {"path": "rounds.max_tokens", "value": 7, "source": "parameter"}
    assert found["optimizer.name"]["source"] == ""
    assert re.search(r"^optimizer.name +adamw +default$", call("validate", file), re.MULTILINE)
    assert call("validate", file, "--quiet") == ""


@pytest.mark.parametrize(
    ("model", "data", "said"),
    [
        ("repo_id: gpt3", "hf://roneneldan/TinyStories", "gpt3"),
        ("repo_id: gpt2", "hf://roneneldan/TinyStory", "roneneldan/TinyStory"),
        ("reference: models/TrainFlow/1/x.json", "hf://roneneldan/TinyStories", "nothing is stored under"),
        (
            "repo_id: gpt2, initialise: random, architecture: {hiden_size: 64}",
            "hf://roneneldan/TinyStories",
            "model.architecture.hiden_size: a LlamaConfig has no such value; did you mean 'hidden_size'?",
        ),
    ],
)
def test_what_does_not_exist_is_named(place: Path, model: str, data: str, said: str):
    (place / "mine.yaml").write_text(f"model: {{{model}}}\ndata: {{dataset: '{data}'}}\n")
    assert said in call("plan", "mine.yaml", status=1)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            {"README.md": b"# weights", "model.gguf": b"GGUF"},
            "acme/mine has no config.json, so it is no model",
        ),
        (
            {
                "adapter_config.json": b'{"base_model_name_or_path": "gpt2"}',
                "adapter_model.safetensors": b"x",
            },
            "acme/mine is an adapter of gpt2, not a whole model",
        ),
    ],
)
def test_a_repository_that_is_no_whole_model_is_named_as_what_it_is(place: Path, start_hub, files, said: str):
    content = stand_in_hub(20)
    content.add("acme/mine", files)
    start_hub(content)
    (place / "mine.yaml").write_text(
        "model: {repo_id: acme/mine}\ndata: {dataset: 'hf://roneneldan/TinyStories'}\n"
    )
    assert said in call("plan", "mine.yaml", status=1)


@pytest.mark.parametrize(
    ("files", "dataset", "said"),
    [
        ({"raw.py": b"import datasets"}, "hf://acme/raw", "use hf://acme/raw@refs/convert/parquet."),
        ({"a.jsonl": b"\n\n"}, "hf://acme/raw", "hf://acme/raw:default:train holds no rows"),
        (
            {"dev.jsonl": b"{}", "test.jsonl": b"{}"},
            "hf://acme/raw",
            "Name one: hf://acme/raw:default:SPLIT.",
        ),
    ],
)
def test_a_dataset_that_cannot_be_read_is_one_line(place: Path, start_hub, files, dataset: str, said: str):
    content = stand_in_hub(20)
    content.add("acme/raw", files, repo_type="dataset")
    start_hub(content)
    (place / "mine.yaml").write_text(f"model: {{repo_id: gpt2}}\ndata: {{dataset: '{dataset}'}}\n")
    answer = call("plan", "mine.yaml", status=1)
    assert said in answer
    assert "Traceback" not in answer
    assert len([line for line in answer.splitlines() if line.strip()]) <= 3, answer


def test_a_slice_of_a_dataset_is_planned(place: Path):
    text = "model: {repo_id: gpt2}\ndata: {dataset: 'hf://roneneldan/TinyStories::train[:%s]', heldout_samples: 10}\n"
    rows = []
    for share in ("100%", "50%"):
        (place / "mine.yaml").write_text(text % share)
        answer = json.loads(call("plan", "mine.yaml", "--tokens-per-second", 1_000_000, "--json"))
        rows.append(answer["plan"]["samples"])
    assert rows[0] - rows[1] == pytest.approx(200, abs=2)


def test_a_dry_run_leaves_no_directory_behind(place: Path, tmp_path: Path, monkeypatch):
    import tempfile

    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    monkeypatch.setattr(DryRun, "plan", lambda *_, **__: 1 / 0)
    (place / "mine.yaml").write_text(
        "model: {repo_id: gpt2}\ndata: {dataset: 'hf://roneneldan/TinyStories'}\n"
    )
    with pytest.raises(ZeroDivisionError):
        CliRunner().invoke(hf, ["plan", "mine.yaml"], catch_exceptions=False)
    assert list((tmp_path / "scratch").iterdir()) == []


DATA = "data: {dataset: 'hf://roneneldan/TinyStories', sequence_length: 32, heldout_samples: 40}\n"


def plan_of(place: Path, model: str, *options: object, status: int = 0) -> str:
    (place / "mine.yaml").write_text(f"model: {{{model}}}\n{DATA}")
    return call("plan", "mine.yaml", "--tokens-per-second", 1_000_000, *options, status=status)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"vocab_size": 401},
            "have other shapes than its config.json says (lm_head.weight|model.embed_tokens.weight) is",
        ),
        ({"num_hidden_layers": 3}, "acme/mine lacks 9 of the model's weights"),
        (
            {"num_hidden_layers": 1},
            "acme/mine holds 9 tensors that the model of its config.json has no place for",
        ),
        (
            {"model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"]},
            "acme/mine is a Qwen2_5_VLForConditionalGeneration, and transformers has no causal language model",
        ),
        (
            {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}},
            "acme/mine needs Python code of its own",
        ),
    ],
)
def test_a_plan_finds_weights_that_do_not_fit_by_their_headers(place: Path, start_hub, config, said: str):
    from stand_ins import _model

    files = _model()
    values = {**json.loads(files["config.json"]), **config}
    # Large beside its header, so that a download would show.
    padding = b"\0" * 2**20
    content = stand_in_hub(60)
    content.add("acme/mine", {**files, "config.json": json.dumps(values).encode(), "other.bin": padding})
    server = start_hub(content)
    server.log.clear()
    assert re.search(
        said.replace("(l", "\\((l").replace("[", "\\["), plan_of(place, "repo_id: acme/mine", status=1)
    )
    read = server.log.entries("GET", "*.safetensors")
    assert all(request.range for request in read)
    assert sum(request.body_bytes for request in read) <= 66_000
    assert not server.log.entries("*", "*.bin")


def test_a_plan_needs_trust_for_pickled_weights(place: Path, start_hub):
    from stand_ins import _model

    files = _model()
    files["pytorch_model.bin"] = files.pop("model.safetensors")
    content = stand_in_hub(60)
    content.add("acme/mine", files)
    start_hub(content)
    said = plan_of(place, "repo_id: acme/mine", status=1)
    assert "acme/mine has its weights only as pickle (pytorch_model.bin)" in said
    plan_of(place, "repo_id: acme/mine, allow_pickle: true")


@pytest.fixture
def directory(place: Path) -> Path:
    """A model as a training leaves it in the current directory, with all that is in the way."""
    from stand_ins import _model

    directory = place / "mine"
    (directory / "checkpoint-10").mkdir(parents=True)
    (directory / ".git").mkdir()
    junk = (
        "optimizer.pt",
        "trainer_state.json",
        "train.log",
        "checkpoint-10/model.safetensors",
        ".git/config",
    )
    for name, data in {**_model(), **dict.fromkeys(junk, b"junk")}.items():
        (directory / name).write_bytes(data)
    return directory


@pytest.mark.parametrize("written", ["./mine", "mine/", "{}", "~/mine"])
def test_a_local_directory_is_planned_and_previewed(place: Path, directory: Path, written: str, monkeypatch):
    monkeypatch.setenv("HOME", str(place))
    before = everything_below(place)
    answer = json.loads(plan_of(place, f"repo_id: '{written.format(directory)}'", "--json"))
    assert everything_below(place) - {"mine.yaml"} == before
    assert answer["plan"]["base_model"] == "mine"
    assert str(place) not in json.dumps(answer["plan"])
    (place / "hub.yaml").write_text(f"model: {{repo_id: gpt2}}\n{DATA}")
    other = json.loads(call("plan", "hub.yaml", "--tokens-per-second", 1_000_000, "--json"))
    same = ("parameters", "tokens", "claims", "memory", "disk")
    assert {name: answer["plan"][name] for name in same} == {name: other["plan"][name] for name in same}
    assert call("preview", "mine.yaml") == call("preview", "hub.yaml")
    assert "model.repo_id" in call("validate", "mine.yaml")
    assert (
        json.loads(plan_of(place, "repo_id: gpt2", "--repo_id", "./mine", "--json"))["plan"]["base_model"]
        == "mine"
    )


@pytest.mark.parametrize("command", ["validate", "plan", "preview"])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("./nowhere", "model.repo_id: the directory './nowhere' does not exist here"),
        ("./mine.yaml", "model.repo_id: the directory './mine.yaml' is a file"),
        ("no where", "'no where' is neither the id of a repository (owner/name) nor the path of a directory"),
        ("a/b/c", "the directory 'a/b/c' does not exist here"),
    ],
)
def test_a_name_of_nothing_is_refused(place: Path, command: str, name: str, said: str):
    (place / "mine.yaml").write_text(f"model: {{repo_id: '{name}'}}\n{DATA}")
    assert said in call(command, "mine.yaml", status=1)


def test_a_local_adapter_is_named_as_one(place: Path):
    (place / "mine").mkdir()
    (place / "mine/adapter_config.json").write_text('{"base_model_name_or_path": "gpt2"}')
    assert "mine is an adapter of gpt2, not a whole model" in plan_of(place, "repo_id: ./mine", status=1)
