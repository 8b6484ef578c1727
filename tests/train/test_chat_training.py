"""Conversations in a training: dates that templates print, templates from elsewhere, prompts that are too long."""

import datetime as dt
import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from metaflow._vendor.click.testing import CliRunner
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from metaflow_hf.data.chat.source import CHATML
from metaflow_hf.data.tokens import ExampleEncoder
from metaflow_hf.errors import ConfigError, TrainingIncomplete
from metaflow_hf.store import configured_store, datastore
from metaflow_hf.store.models import load_directory
from metaflow_hf.train import encoding
from metaflow_hf.train.job import TrainingJob
from metaflow_hf_cli.group import hf

SHIPPED = Path(find_spec("trl").origin).parent / "chat_templates"
DATED = (
    "{% set today = strftime_now('%d %b %Y') %}<|im_start|>system\nToday Date: {{ today }}<|im_end|>\n"
    + CHATML
)
OWN = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<|im_end|>{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"


@pytest.fixture
def make_job(tmp_path: Path, model_dir: Path, monkeypatch):
    """Jobs on a dataset of short conversations, in a datastore of the test's own."""
    monkeypatch.setattr(datastore, "_active", ("local", str(tmp_path / ".metaflow")))
    monkeypatch.delenv("METAFLOW_RUNTIME_ENVIRONMENT", raising=False)

    def make(lineage: str | None = None, **sections) -> TrainingJob:
        (tmp_path / "raw.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows()))
        data = {
            "dataset": str(tmp_path / "raw.jsonl"),
            "heldout_samples": 4,
            "sequence_length": 128,
            "batch_size": 2,
        }
        values = {
            "model": {"repo_id": "a/tiny"},
            "data": {**data, **sections.pop("data", {})},
            "rounds": {"seconds": 0.1},
            "evaluation": {"max_samples": 4, "max_new_tokens": 2},
            **sections,
        }
        return TrainingJob.configured(values, run="F-1", lineage=lineage).check_data().build()

    return make


def rows(count=40, words=1):
    return [
        [
            {"role": "user", "content": f"the value {number} " + "of a list " * words},
            {"role": "assistant", "content": f"it is {number}"},
        ]
        for number in range(count)
    ]


@pytest.mark.parametrize("template", ["llama3_2", "gptoss", DATED])
def test_tokens_stay_the_same_when_the_day_changes(template, make_job, model_dir, monkeypatch):
    """Between the start of a lineage, its workers, their resumption and the evaluation."""
    dates: list[tuple[str, set[str]]] = []
    clock = {"day": 1}

    class Calendar(dt.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 1, clock["day"], 12, tzinfo=tz)

    tokenize = ExampleEncoder.tokenize

    def recording(self, transcripts):
        found = {
            date
            for one in transcripts
            for date in re.findall("(?:Today Date|Current date): (.*?)(?:\n|<)", one.text)
        }
        dates.append((f"day {clock['day']}", found))
        return tokenize(self, transcripts)

    monkeypatch.setattr(chat_template_utils, "datetime", Calendar)
    monkeypatch.setattr(encoding.dt, "datetime", Calendar)
    monkeypatch.setattr(ExampleEncoder, "tokenize", recording)
    job = make_job(
        data={"chat_template": template, "sequence_length": 256}, report={"interval_seconds": 0.001}
    )
    plan = job.begin(model_dir, {"commit_hash": "c" * 40})

    clock["day"] = 2
    lines = []

    def interrupted(line):
        lines.append(line)
        if "step" in line and clock["day"] == 2:
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, TrainingIncomplete)):
        job.work(model_dir, branch=0, write=interrupted)
    clock["day"] = 3
    assert job.begin(model_dir, {"commit_hash": "c" * 40}).tokens == plan.tokens
    metrics = job.work(model_dir, branch=0, write=lines.append)
    clock["day"] = 4
    reference = job.export(model_dir, pathspec="F/1/merge/2")
    trained = load_directory(configured_store(), reference, model_dir.parent / f"trained-{len(template)}")
    job.evaluate(model_dir, trained, plan=plan, model=reference, metrics=[metrics], run="F/1")
    assert {day for day, _ in dates} >= {"day 1", "day 2", "day 3", "day 4"}
    assert set().union(*(found for _, found in dates)) == {
        "2031-01-01" if template == "gptoss" else "01 Jan 2031"
    }


def sources(directory: Path) -> dict[str, tuple[str, str]]:
    """What ``data.chat_template`` may be, and the template that it means."""
    (directory / "own.jinja").write_text(OWN)
    folder = directory / "folder"
    folder.mkdir()
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": OWN}))
    return {
        "file": (str(directory / "own.jinja"), OWN),
        "Jinja": (OWN, OWN),
        "directory": (str(folder), OWN),
        "built in": ("chatml", CHATML),
        "shipped by TRL": ("qwen3_training", (SHIPPED / "qwen3_training.jinja").read_text("utf-8")),
    }


@pytest.mark.parametrize("kind", ["file", "Jinja", "directory", "built in", "shipped by TRL"])
def test_a_template_from_elsewhere_is_exported(kind, make_job, model_dir, tmp_path):
    setting, template = sources(tmp_path)[kind]
    job = make_job(data={"chat_template": setting})
    plan = job.begin(model_dir, {"commit_hash": "c" * 40})
    rendered = "".join(text for _, text in plan.example)
    assert ("[assistant] " if template == OWN else "<|im_start|>assistant\n") in rendered
    job.work(model_dir, branch=0, write=lambda line: None)
    reference = job.export(model_dir, pathspec="F/1/merge/2")
    exported = AutoTokenizer.from_pretrained(
        load_directory(configured_store(), reference, tmp_path / "exported")
    )
    assert exported.chat_template == template
    messages = [{"role": "user", "content": "hi"}]
    assert exported.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def test_templates_that_do_not_exist_are_told(make_job, model_dir, tmp_path):
    (tmp_path / "empty").mkdir()
    for setting, words in (
        ("no_such", "data.chat_template must be Jinja, a file"),
        (str(tmp_path / "empty"), "has no"),
    ):
        with pytest.raises(ConfigError, match=words):
            make_job(data={"chat_template": setting}).begin(model_dir, {"commit_hash": "c" * 40})


def test_prompts_longer_than_what_is_trained_are_refused_by_plan_and_start(
    make_job, model_dir, tmp_path, monkeypatch
):
    long = "".join(json.dumps({"messages": row}) + "\n" for row in rows(words=60))
    (tmp_path / "long.jsonl").write_text(long)
    data = {
        "dataset": str(tmp_path / "long.jsonl"),
        "long_documents": "truncate",
        "sequence_length": 32,
        "heldout_samples": 4,
    }
    with pytest.raises(ConfigError, match="after data.long_documents: truncate at data.sequence_length: 32"):
        make_job(data=data).begin(model_dir, {"commit_hash": "c" * 40})
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"model": {"repo_id": str(model_dir)}, "data": data}))
    monkeypatch.chdir(tmp_path)
    done = CliRunner(mix_stderr=False).invoke(hf, ["plan", "mine.yaml"])
    assert done.exit_code != 0
    assert "data.long_documents: truncate at data.sequence_length: 32" in done.stderr
    assert "Raise data.sequence_length, or set data.long_documents: split" in done.stderr
    # What is advised works.
    make_job(data={**data, "long_documents": "split"}).begin(model_dir, {"commit_hash": "c" * 40})
