"""A training run as the steps of a flow see it: plain values between them, one method per step.

Light to import: what is heavy loads in the step that needs it.
"""

import logging
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from metaflow_hf.config import TrainConfig
from metaflow_hf.config_sections import ModelKind
from metaflow_hf.events import Event
from metaflow_hf.references import ModelRef
from metaflow_hf.report.outcome import Outcome, Plan
from metaflow_hf.report.units import byte_size
from metaflow_hf.store import ObjectStore, configured_store, quote_part

if TYPE_CHECKING:
    from metaflow_hf.data import BlockManager
    from metaflow_hf.data.mixture import ReadableBlocks
    from metaflow_hf.data.order import Order
    from metaflow_hf.report.page import Page
    from metaflow_hf.train.publishing import Publication

logger = logging.getLogger("metaflow_hf.train")


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """What is trained, on what, under which name; ``to_json`` and ``from_json`` carry it from task to task.

    ``lineage`` names the training in the datastore, ``training`` and ``heldout`` the datasets of blocks there
    (empty until they are built; ``heldout`` stays empty when rows of the training dataset are held out). ``parts`` are
    the datasets of a mixture; then ``training`` stays empty.
    ``model_hub`` and ``data_hub`` are the hubs that they come from: ``embedded``, a URL, or ``None`` for the
    environment's.
    """

    config: TrainConfig
    lineage: str
    training: str = ""
    heldout: str = ""
    parts: tuple[str, ...] = ()
    model_hub: str | None = None
    data_hub: str | None = None

    @classmethod
    def configured(
        cls,
        values: Mapping[str, Any],
        *,
        run: str,
        repo_id: str | None = None,
        revision: str | None = None,
        reference: str | None = None,
        dataset: str | None = None,
        lineage: str | None = None,
        num_gpus: int | None = None,
        max_tokens: int | None = None,
    ) -> Self:
        """The job that a configuration describes, with a flow's parameters (where given) in place of its values.

        ``run`` names the lineage when ``lineage`` does not; ``num_gpus`` 0 means all that are visible here, or one
        branch on the CPU. The embedded hub serves what the configuration names; another model or dataset comes from
        the environment's hub. Raises ``ConfigError`` that lists all mistakes.
        """
        from metaflow_hf.train.parameters import configured

        config, model_hub, data_hub = configured(
            values,
            repo_id=repo_id,
            revision=revision,
            reference=reference,
            dataset=dataset,
            num_gpus=num_gpus,
            max_tokens=max_tokens,
        )
        return cls(config=config, lineage=quote_part(lineage or run), model_hub=model_hub, data_hub=data_hub)

    def to_json(self) -> dict[str, Any]:
        """A plain dict, as an artifact holds it."""
        return {**asdict(self), "config": self.config.model_dump(mode="json")}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The job that ``to_json`` wrote."""
        parts = tuple(value.get("parts", ()))
        return cls(**{**value, "config": TrainConfig.parse(value["config"]), "parts": parts})

    def pinned(self) -> Self:
        """The job with the commits of the lineage of this name, if it was started, in place of branches and tags."""
        from metaflow_hf.train.lineage import Lineage
        from metaflow_hf.train.pinning import pinned

        store = self._lineage_store()
        if not store.children("rounds"):
            return self
        return replace(self, config=pinned(self.config, Lineage(store).spec()))

    def check_data(self) -> Self:
        """Looks at the datasets without downloading them: they exist, can be read, and have texts. And at what else the
        run needs: packages of extras, a token where its model is to be published.

        Raises ``ConfigError`` for what is missing, for an unknown text column and for an evaluation dataset that is
        the one trained on, ``SelectionError`` and the hub's errors.
        """
        from metaflow_hf.train.blocks import check_sources
        from metaflow_hf.train.prerequisites import check_prerequisites

        check_prerequisites(self.config)
        check_sources(self.config.data)
        return self

    def first_rows(self) -> list[Sequence[Mapping[str, Any]]]:
        """Some rows from the beginning of each dataset. Raises the errors of the source."""
        from metaflow_hf.train.first_rows import read_first_rows

        return read_first_rows(self.config.data)

    def check_model(
        self, base_model: Mapping[str, Any], rows: Sequence[Sequence[Mapping[str, Any]]] | None = None
    ) -> None:
        """Looks at what the model of a reference says about itself, and at the names and shapes of its weights: can it be
        trained like that? With ``rows`` (``first_rows``) its tokenizer encodes them.

        Raises ``UnsupportedModelError``, ``ConfigError``, and ``BadRowError`` for a row that cannot be used.
        """
        from metaflow_hf.store.models import find_manifest
        from metaflow_hf.store.node_cache import NodeCache
        from metaflow_hf.train.description import check_length, write_description
        from metaflow_hf.train.first_rows import check_rows

        store = configured_store()
        with tempfile.TemporaryDirectory(prefix="description-") as scratch:
            cache, target = NodeCache(Path(scratch) / "cache"), Path(scratch) / "model"
            directory = write_description(store, base_model, target, cache=cache)
            check_length(directory, self.config)
            # Imports torch.
            from metaflow_hf.train.suitability import check_model
            from metaflow_hf.train.weight_files import StoredFiles

            check_model(directory, self.config, StoredFiles(store, find_manifest(store, base_model)[1]))
            if rows is not None:
                check_rows(directory, self.config, rows)

    def save_directory(self, pathspec: str) -> tuple[Self, dict[str, Any]]:
        """Stores the local directory that ``model.repo_id`` names, as a model of the task ``pathspec``.

        Returns the job that begins with the stored model, and its reference; the same one for a retry of the task. Only
        what transformers needs is stored, and the directory's path is not. Raises ``ConfigError`` where there is no such
        directory, ``UnsupportedModelError`` for one without a whole model.
        """
        from metaflow_hf.train.model_source import save_directory_model

        reference = save_directory_model(configured_store(), self.config.model, pathspec)
        stored = {"repo_id": None, "revision": "main", "reference": reference.key}
        return replace(self, config=self.config.replace(model=stored)), reference.to_json()

    def without_path(self) -> Self:
        """The job with the last part of a local directory's path in place of the path."""
        model = self.config.model
        if model.directory is None:
            return self
        return replace(self, config=self.config.replace(model={"repo_id": f"./{model.name}"}))

    def build(self) -> Self:
        """Streams the datasets into blocks in the datastore, what is missing of them, and settles ``auto`` sizes."""
        from metaflow_hf.train.blocks import build_parts, build_source

        data, wanted = self.config.data, self.config.evaluation.max_samples
        return replace(
            self,
            config=self.config.replace(data={"dataset_chunk_size": self._chunk_size()}),
            training="" if data.datasets else build_source(str(data.dataset), data),
            parts=build_parts(data),
            heldout=build_source(data.evaluation_dataset, data, num_samples=wanted)
            if data.evaluation_dataset
            else "",
        )

    def begin(self, model_dir: str | Path, base_model: Mapping[str, Any]) -> Plan:
        """Starts the lineage, or joins the one of this name, and plans; safe to repeat.

        ``base_model`` is the reference of ``model_dir``. Raises ``LineageMismatch`` with all differences when the
        lineage trains something else, ``ConfigError`` for too little data, ``UnsupportedModelError``.
        """
        from metaflow_hf.train.description import check_length
        from metaflow_hf.train.encoding import with_template_date
        from metaflow_hf.train.heldout import count_copies
        from metaflow_hf.train.planning import Extent, look, make_plan
        from metaflow_hf.train.records import Spec
        from metaflow_hf.train.running import start_lineage
        from metaflow_hf.train.survey import Survey

        _without_progress_bars()
        check_length(Path(model_dir), self.config)
        with ExitStack() as stack:
            training = stack.enter_context(self._open_training())
            heldout = stack.enter_context(self._open(self.heldout)) if self.heldout else None
            copies = count_copies(training, heldout, self.config)
            surveys: list[Survey] = []

            def check(spec: Spec) -> None:
                config = with_template_date(self.config, Path(model_dir), spec)
                extent = Extent.of(spec)
                surveys.append(look(extent, training, heldout, model_dir=Path(model_dir), config=config))

            spec = start_lineage(
                store=self._lineage_store(),
                blocks=training,
                heldout=heldout,
                model_dir=Path(model_dir),
                config=self.config,
                lineage=self.lineage,
                base_model=base_model,
                check=check,
            )
            return make_plan(
                Extent.of(spec),
                training,
                heldout,
                model_dir=Path(model_dir),
                config=self._dated(Path(model_dir)),
                base_model=base_model,
                copies=copies,
                found=surveys[0] if surveys else None,
            )

    def work(
        self,
        model_dir: str | Path,
        *,
        branch: int,
        write: Callable[[str], None],
        notice: str | None = None,
        plan: Plan | None = None,
        draw: "Callable[[Page], None] | None" = None,
        task: str | None = None,
        retry_count: int = 0,
    ) -> str:
        """Trains as one worker until the lineage is final; returns the worker's ``metrics.jsonl``.

        SIGTERM, or the file ``notice`` (``current.spot_termination_notice``) once it is there, publishes what is
        finished and raises ``TrainingIncomplete``, as any end but a final lineage raises. ``draw`` gets the run's page
        again and again, begun with ``plan``: the first branch shows all workers, every other one itself.
        ``task`` is ``current.pathspec``: a retry of it (``retry_count``) need not wait for what its earlier attempts
        had claimed.
        """
        from metaflow_hf.train.devices import take_share
        from metaflow_hf.train.listening import Listeners
        from metaflow_hf.train.running import train_worker
        from metaflow_hf.train.stopping import stopping
        from metaflow_hf.train.worker import new_attempt

        take_share(branch, self.config.rounds.workers, self.config.rounds.gpus_per_worker)
        _without_progress_bars()
        store, attempt = self._lineage_store(), new_attempt(random.SystemRandom())
        listeners = Listeners(
            config=self.config,
            lineage=self.lineage,
            store=store,
            branch=branch,
            attempt=attempt,
            write=write,
            plan=plan,
            draw=draw,
        )
        with tempfile.TemporaryDirectory(prefix="metrics-") as scratch, stopping() as stop:
            path = Path(scratch) / "metrics.jsonl"
            with ExitStack() as stack:
                on_event = stack.enter_context(listeners.open(path))
                train_worker(
                    store=store,
                    blocks=stack.enter_context(self._open_training()),
                    heldout=stack.enter_context(self._open(self.heldout)) if self.heldout else None,
                    model_dir=Path(model_dir),
                    config=self.config,
                    lineage=self.lineage,
                    attempt=attempt,
                    on_event=on_event,
                    stop=stop,
                    notice=Path(notice) if notice else None,
                    task=task,
                    is_retry=retry_count > 0,
                )
            return path.read_text("utf-8")

    def all_metrics(self, branches: Sequence[str]) -> list[str]:
        """What the branches returned, and what the store kept of everybody else who worked on the lineage: processes
        that were killed, earlier runs, other runs that joined.
        """
        from metaflow_hf.train.stored_metrics import stored_metrics

        told = {event.worker for metrics in branches for event in merged_events([metrics])}
        stored = stored_metrics(self._lineage_store())
        return [*branches, *(metrics for attempt, metrics in stored.items() if attempt not in told)]

    def export(
        self,
        model_dir: str | Path,
        *,
        pathspec: str,
        base_model: Mapping[str, Any] | None = None,
        kind: ModelKind = "last",
    ) -> dict[str, Any]:
        """The final model as a reference; the same one however often it is asked for.

        ``pathspec`` is flow/run/step/task, ``base_model`` the reference of ``model_dir``, which the metadata name;
        ``kind`` is which weights, as ``evaluation.model`` names them; ``last`` is to be asked for last. Raises
        ``TrainingIncomplete`` while the lineage is not final.
        """
        from metaflow_hf.train.export import export_lineage

        _without_progress_bars()
        flow, run, step, task = pathspec.split("/")
        reference: ModelRef = export_lineage(
            store=self._lineage_store(),
            models=configured_store(),
            model_dir=Path(model_dir),
            config=self.config,
            flow=flow,
            run=run,
            step=step,
            task=task,
            best=kind == "best",
            ema=kind == "ema",
            base_model=base_model or {},
            metadata={"base_model": self.config.model.name, "dataset": self.config.data.title},
            order=self._mixed_order(),
        )
        return reference.to_json()

    def exports(
        self, model_dir: str | Path, *, pathspec: str, base_model: Mapping[str, Any] | None = None
    ) -> dict[ModelKind, dict[str, Any] | None]:
        """``export`` of each kind; ``ema`` is ``None`` where no average was kept."""
        kinds: tuple[ModelKind, ...] = ("best", "ema", "last")
        return {
            kind: None
            if kind == "ema" and self.config.rounds.ema_half_life is None
            else self.export(model_dir, pathspec=pathspec, base_model=base_model, kind=kind)
            for kind in kinds
        }

    def evaluate(
        self,
        base_dir: str | Path,
        model_dir: str | Path,
        *,
        plan: Plan,
        model: Mapping[str, Any],
        metrics: Sequence[str],
        run: str,
    ) -> Outcome:
        """The same held-out texts and prompts under the model before and after training."""
        from metaflow_hf.train.comparison import compare
        from metaflow_hf.train.results import store_results

        _without_progress_bars()
        events = merged_events(metrics)
        with ExitStack() as stack:
            training = stack.enter_context(self._open_training())
            heldout = stack.enter_context(self._open(self.heldout)) if self.heldout else None
            outcome = compare(
                Path(base_dir),
                Path(model_dir),
                training=training,
                heldout=heldout,
                config=self._dated(Path(base_dir)),
                plan=plan,
                model=model,
                events=events,
                run=run,
            )
        store_results(self._lineage_store(), outcome, events)
        return outcome

    def _dated(self, model_dir: Path) -> TrainConfig:
        """The configuration with the date that the lineage's chat template prints."""
        from metaflow_hf.train.encoding import with_template_date
        from metaflow_hf.train.lineage import Lineage

        return with_template_date(self.config, model_dir, Lineage(self._lineage_store()).spec())

    def heldout_texts(self) -> list[Any]:
        """Texts and conversations that no worker trains, as ``evaluate`` measures them."""
        from metaflow_hf.train.heldout import measured_rows

        with ExitStack() as stack:
            training = stack.enter_context(self._open_training())
            heldout = stack.enter_context(self._open(self.heldout)) if self.heldout else None
            return [row.value for row in measured_rows(training, heldout, self.config)]

    def publish(self, model: Mapping[str, Any], *, write: Callable[[str], None]) -> "Publication | None":
        """Pushes the model to ``publish.repo_id``, with a model card; ``None`` where that is not configured."""
        settings = self.config.publish
        if settings.repo_id is None:
            return None
        from metaflow_hf.train.publishing import publish

        done = publish(
            configured_store(),
            model,
            settings.repo_id,
            revision=settings.revision,
            private=settings.private,
            endpoint=None if self.config.hub == "embedded" else self.config.hub,
            dry_run=settings.dry_run,
        )
        size = byte_size(sum(size for _, size in done.files))
        what = f"{len(done.files)} files, {size}"
        write(
            f"pushed {what} to {done.url}"
            if done.url
            else f"would push {what} to {done.repo_id} (publish.dry_run)"
        )
        return done

    def _lineage_store(self) -> ObjectStore:
        return configured_store().child(f"training/{self.lineage}")

    def _open_training(self) -> "ReadableBlocks":
        from metaflow_hf.train.blocks import open_mixture

        if self.parts:
            return open_mixture(self.config.data, self.parts, self._chunk_size())
        return self._open(self.training)

    def _mixed_order(self) -> "Order | None":
        """The order of the lineage, where it trains a mixture."""
        if not self.parts:
            return None
        from metaflow_hf.train.lineage import Lineage
        from metaflow_hf.train.spec import order_of

        with self._open_training() as blocks:
            sizes = [block.sample_count for block in blocks.manifest.blocks]
        return order_of(Lineage(self._lineage_store()).spec().order, sizes)

    def _open(self, key: str) -> "BlockManager":
        from metaflow_hf.data import BlockManager
        from metaflow_hf.train.blocks import format_settings

        data = self.config.data
        return BlockManager(
            configured_store().child(key),
            data.samples_per_block,
            self._chunk_size(),
            **format_settings(data),
        )

    def _chunk_size(self) -> int:
        """Samples a chunk; ``auto`` takes what the lineage began with, else what suits this machine."""
        from metaflow_hf.data.sizes import chunk_samples

        wanted = self.config.data.dataset_chunk_size
        if wanted != "auto":
            return wanted
        return started_chunk_samples(self._lineage_store()) or chunk_samples()


def merged_events(metrics: Sequence[str]) -> list[Event]:
    """The events of several workers' ``metrics.jsonl`` in the order of time."""
    from metaflow_hf.report import merge_events, parse_events

    return merge_events(*(parse_events(text) for text in metrics))


def _without_progress_bars() -> None:
    """Keeps transformers' bars out of a task's log, where they cannot be redrawn."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def started_chunk_samples(lineage: ObjectStore) -> int | None:
    """The chunk size with which a lineage was started, or ``None`` when it was not."""
    from metaflow_hf.train.lineage import Lineage

    if not lineage.children("rounds"):
        return None
    return int(Lineage(lineage).spec().order["chunk_samples"])
