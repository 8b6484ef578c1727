"""Tasks of lm-evaluation-harness: the figures are its own, and what cannot be run is said before training."""

import json

import pytest

from metaflow_hf.config import HarnessConfig, ModelConfig, TrainConfig
from metaflow_hf.errors import ConfigError
from metaflow_hf.report import Outcome, Plan, summary_text, training_page
from metaflow_hf.report.outcome import TaskResult
from metaflow_hf.train.harness import run_harness
from metaflow_hf.train.models import load_model, load_tokenizer


@pytest.mark.filterwarnings("ignore")
def test_a_task_of_ones_own_is_measured_as_the_harness_does(model_dir, tmp_path, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [
        {"question": f"the {word} of", "choices": ["a file", "zzz qqq"], "answer": 0}
        for word in ("list", "name", "value")
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.yaml").write_text(
        f"""
task: mine
dataset_path: json
dataset_kwargs:
  data_files:
    test: {tmp_path / "rows.jsonl"}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
    )
    model, tokenizer = load_model(model_dir, ModelConfig()), load_tokenizer(model_dir)
    settings = HarnessConfig(tasks=["mine"], include_path=str(tmp_path), limit=2)
    found = run_harness(model, tokenizer, settings)
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    direct = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1),
        tasks=["mine"],
        limit=2,
        task_manager=TaskManager(include_path=str(tmp_path)),
        bootstrap_iters=0,
    )
    assert found["mine", "acc"] == direct["results"]["mine"]["acc,none"]
    with pytest.raises(ConfigError, match="knows no task 'no-such-task'"):
        run_harness(model, tokenizer, settings.model_copy(update={"tasks": ["mine", "no-such-task"]}))


def test_without_tasks_there_is_nothing_to_run():
    with pytest.raises(ConfigError, match="evaluation.harness.tasks"):
        TrainConfig.parse({"evaluation": {"harness": {"tasks": []}}})


def test_figures_are_in_the_summary_and_on_the_card():
    result = TaskResult(task="hellaswag", metric="acc_norm", before=0.25, after=0.3125)
    outcome = Outcome(plan=Plan(base_model="m", dataset="d"), tasks=(result,))
    assert "hellaswag" in summary_text(outcome)
    assert "0.3125" in summary_text(outcome)
    assert "acc_norm" in str(training_page(outcome.plan, [], outcome).blocks)
