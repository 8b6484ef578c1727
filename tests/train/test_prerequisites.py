"""What would end a run at its end is said when it begins."""

import sys

import pytest

from metaflow_hf.config import TrainConfig
from metaflow_hf.errors import ConfigError
from metaflow_hf.train.prerequisites import check_prerequisites
from metaflow_hf_cli.fixtures import OWNER

PUBLISHED = {"publish": {"repo_id": "acme/mine"}}


def check(**sections) -> None:
    check_prerequisites(TrainConfig.parse(sections))


def test_all_missing_packages_are_named_at_once(monkeypatch):
    for name in ("peft", "bitsandbytes", "lm_eval", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError) as error:
        check(
            model={"lora": {}},
            optimizer={"name": "adamw_8bit"},
            evaluation={"harness": {"tasks": ["hellaswag"]}},
            report={"trackers": ["wandb", "tensorboard"]},
        )
    assert str(error.value) == (
        "model.lora needs peft, optimizer.name: adamw_8bit needs bitsandbytes, evaluation.harness needs lm_eval, "
        "report.trackers: wandb needs wandb: not installed here. Install what is missing by "
        "`pip install 'metaflow-hf[peft,bitsandbytes,lm-eval,wandb]'`, or take it out of the configuration."
    )
    check()


def test_tasks_that_the_harness_does_not_know_are_named():
    pytest.importorskip("lm_eval")
    with pytest.raises(ConfigError, match="knows no task 'no-such-task'"):
        check(evaluation={"harness": {"tasks": ["no-such-task"]}})


def test_a_model_is_not_trained_for_a_hub_that_will_refuse_it(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    with pytest.raises(ConfigError, match="the hub does not accept the token") as error:
        check(**PUBLISHED)
    assert "hf_nobody" not in str(error.value)
    monkeypatch.setenv("HF_TOKEN", OWNER)
    check(**PUBLISHED)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=r"HF_HUB_OFFLINE is set\. Unset it, or set publish\.dry_run"):
        check(**PUBLISHED)


@pytest.mark.parametrize("where", [None, "embedded"])
def test_nor_without_a_token(hub, where):
    with pytest.raises(ConfigError, match="pushed to acme/mine at the end: there is no token"):
        check(hub=where, **PUBLISHED)
    check(publish={"repo_id": "acme/mine", "dry_run": True})


def test_a_hub_that_does_not_answer_now_may_answer_then(hub, monkeypatch, caplog):
    monkeypatch.setenv("HF_TOKEN", OWNER)
    check(hub="http://127.0.0.1:9", **PUBLISHED)
    assert "whether the model can be published is not known" in caplog.text
