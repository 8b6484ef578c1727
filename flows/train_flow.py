"""Train a causal language model of the hub on a dataset of the hub, one foreach branch per GPU.

start ── prepare ──┬─ train ─┬── merge ── evaluate ── end
                   └─ train ─┘

The branches need no network between them: they meet in the datastore, round by round, and any of them may be
killed, restarted or joined by more. `python flows/train_flow.py run` trains a tiny model on this machine.
"""

from dataclasses import replace
from pathlib import Path

from metaflow import (
    Config,
    FlowSpec,
    Parameter,
    card,
    current,
    huggingface_hub,
    model,
    pinned_gpus,
    resources,
    retry,
    step,
)

from metaflow_extensions.hf import parameters as types
from metaflow_extensions.hf.card_components import card_path, show
from metaflow_extensions.hf.trained import find_model
from metaflow_hf.report import plan_text, ruled, summary_text, training_page
from metaflow_hf.train.job import TrainingJob, merged_events

DEMO = Path(__file__).resolve().parent.parent / "configs" / "demo.yaml"


class TrainFlow(FlowSpec):
    """Fine-tune or pre-train a model on texts, on as many GPUs as there are."""

    config = Config("config", default=str(DEMO), parser=types.parse_config, help="YAML with all settings.")
    repo_id = Parameter("repo_id", type=types.model, default="", help="owner/name or ./directory of a model.")
    revision = Parameter("revision", type=types.revision, default="", help="Its branch, tag or commit.")
    reference = Parameter("reference", type=types.name, default="", help="Stored model: a key, or Flow/run.")
    dataset = Parameter("dataset", type=types.source, default="", help="hf://owner/name[:config[:split]], …")
    num_gpus = Parameter("num_gpus", type=int, default=None, help="Branches; 0: all GPUs of this machine.")
    lineage = Parameter("lineage", type=types.name, default="", help="Training to continue, or to join.")
    max_tokens = Parameter("max_tokens", type=int, default=None, help="End with the round that reaches them.")

    @huggingface_hub
    @step
    def start(self):
        """Check everything that can be checked, and cache the model at one commit."""
        job = TrainingJob.configured(
            self.config,
            run=f"{current.flow_name}-{current.run_id}",
            repo_id=self.repo_id,
            revision=self.revision,
            reference=self.reference,
            dataset=self.dataset,
            num_gpus=self.num_gpus,
            lineage=self.lineage,
            max_tokens=self.max_tokens,
        ).pinned()
        wanted, hub = job.config.model, current.huggingface_hub
        hub.connect(job.data_hub)
        rows = job.check_data().first_rows()
        hub.connect(job.model_hub)
        if wanted.directory:
            job, self.base_model = job.save_directory(current.pathspec)
        elif wanted.reference:
            self.base_model = find_model(wanted.reference)
        else:
            self.base_model = hub.snapshot_download(repo_id=wanted.repo_id, revision=wanted.revision)
        job.check_model(self.base_model, rows)
        self.job = job.to_json()
        self.next(self.prepare)

    @huggingface_hub
    @model(load="base_model")
    @step
    def prepare(self):
        """Stream the dataset into blocks, begin the lineage, and say what is going to happen."""
        job = TrainingJob.from_json(self.job)
        current.huggingface_hub.connect(job.data_hub)
        job = job.build()
        self.plan = job.begin(current.model.loaded["base_model"], self.base_model)
        print(ruled(plan_text(self.plan)))
        self.job = job.to_json()
        self.branches = list(range(job.config.rounds.workers))
        self.next(self.train, foreach="branches")

    @resources(gpu=config.resources.gpu, cpu=config.resources.cpu, memory=config.resources.memory)
    @retry(times=3, minutes_between_retries=0)
    @pinned_gpus(per_branch=config.rounds.gpus_per_worker)
    @card(type="blank", id="training", refresh_interval=5)
    @model(load="base_model")
    @step
    def train(self):
        """Claim, train and contribute, round by round, until the lineage is final."""
        job = TrainingJob.from_json(self.job)
        self.metrics = job.work(
            current.model.loaded["base_model"],
            branch=self.input,
            write=print,
            notice=current.get("spot_termination_notice"),
            plan=self.plan,
            draw=lambda page: show(current.card["training"], page),
            task=current.pathspec,
            retry_count=current.retry_count,
        )
        self.next(self.merge)

    @model(load="base_model")
    @step
    def merge(self, inputs):
        """The weights of the final round, with configuration and tokenizer, as a model reference."""
        self.merge_artifacts(inputs, include=["job", "plan", "base_model"])
        job = TrainingJob.from_json(self.job)
        self.metrics = job.all_metrics([branch.metrics for branch in inputs])
        base, task = current.model.loaded["base_model"], current.pathspec
        exports = job.exports(base, pathspec=task, base_model=self.base_model)
        self.best_model, self.ema_model, self.last_model = exports["best"], exports["ema"], exports["last"]
        self.model = exports[job.config.evaluation.model]
        self.next(self.evaluate)

    @resources(gpu=config.resources.gpu, cpu=config.resources.cpu, memory=config.resources.memory)
    @card(type="blank", id="training")
    @model(load=["base_model", "model"])
    @step
    def evaluate(self):
        """The same held-out text and prompts before and after; the card."""
        print("Measuring held-out text and sampling, before and after …")
        base, new = current.model.loaded["base_model"], current.model.loaded["model"]
        run = f"{current.flow_name}/{current.run_id}"
        self.outcome = TrainingJob.from_json(self.job).evaluate(
            base, new, plan=self.plan, model=self.model, metrics=self.metrics, run=run
        )
        show(current.card["training"], training_page(self.plan, merged_events(self.metrics), self.outcome))
        self.evaluation = current.pathspec
        self.next(self.end)

    @step
    def end(self):
        """What came out, how to load it, where the card is; onto the hub where that is configured."""
        self.published = TrainingJob.from_json(self.job).publish(self.model, write=print)
        outcome = replace(self.outcome, card=card_path(self.evaluation, "training"))
        print(ruled(summary_text(outcome)))


if __name__ == "__main__":
    TrainFlow()
