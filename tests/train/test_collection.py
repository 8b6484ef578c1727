"""What a collection frees of trainings, on a lineage that was really trained."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from metaflow_hf.errors import NotFound
from metaflow_hf.store import open_store
from metaflow_hf.store.models import delete_reference, load_directory
from metaflow_hf.train import export_lineage
from metaflow_hf.train.collection import collect_lineages
from metaflow_hf.train.lineage import Lineage

PAYLOADS = {"weights", "outer", "inner", "claims", "deltas", "heartbeats", "metrics"}


def after(days: float):
    return lambda: datetime.now(UTC) + timedelta(days=days)


@pytest.fixture
def root(training, tmp_path, monkeypatch):
    """The root of the datastore; the lineage ``test`` lies below it and keeps recent rounds only."""
    monkeypatch.setenv("METAFLOW_HF_CACHE", str(tmp_path / "node-cache"))
    store = open_store(tmp_path / "store")
    training.store = store.child("training/test")
    training.config = training.config.replace(rounds={"keep": "recent", "max_tokens": 600})
    return store


@pytest.fixture
def export(training, root):
    def run(task: str = "7"):
        return export_lineage(
            store=training.store,
            models=root,
            model_dir=training.model_dir,
            config=training.config,
            flow="F",
            run="1",
            step="join",
            task=task,
        )

    return run


def test_an_exported_lineage_gives_back_its_tensors_and_keeps_its_history(training, root, export, tmp_path):
    training.start()
    training.work()
    assert collect_lineages(root) == []
    reference = export()
    before = {info.key: info.size for info in training.store.list()}
    rehearsed = collect_lineages(root, dry_run=True)
    assert {info.key: info.size for info in training.store.list()} == before
    assert collect_lineages(root) == rehearsed
    [collected] = rehearsed
    kept = {info.key: info.size for info in training.store.list()}
    assert (collected.lineage, collected.reason) == ("test", "exported")
    assert (collected.objects, collected.bytes) == (
        len(before) - len(kept),
        sum(before.values()) - sum(kept.values()),
    )
    assert [key for key in before if key.partition("/")[0] not in PAYLOADS] == list(kept)
    assert {key.partition("/")[0] for key in kept} >= {"spec.json", "rounds", "exports"}
    assert collect_lineages(root) == []
    # Nobody misses them: the model loads, is exported no second time, and workers see that all is done.
    assert export(task="8") == reference
    assert (load_directory(root, reference, tmp_path / "out") / "model.safetensors").exists()
    training.start()
    training.work()


def test_an_unfinished_lineage_goes_when_nobody_wrote_for_thirty_days(training, root):
    training.start()
    assert collect_lineages(root, now=after(29)) == []
    [collected] = collect_lineages(root, now=after(31))
    assert collected.reason == "idle"
    left = {info.key.partition("/")[0] for info in training.store.list()}
    assert left >= {"rounds", "spec.json"}
    assert not PAYLOADS & left
    with pytest.raises(NotFound, match="weights/"):
        training.work()


def test_one_new_record_makes_a_lineage_young_again(training, root):
    training.start()
    [info] = training.store.list("rounds")
    moment = info.last_modified + timedelta(days=40)

    class Later:
        """The store, forty days on; ``written`` came just now."""

        def __init__(self, inner, written=()):
            self.inner, self.written = inner, written

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def child(self, prefix):
            return Later(self.inner.child(prefix), self.written)

        def list(self, prefix=""):
            for info in self.inner.list(prefix):
                yield replace(info, last_modified=moment) if info.key in self.written else info

    training.store.put("heartbeats/somebody", b"{}")
    assert collect_lineages(Later(root, ["heartbeats/somebody"]), dry_run=True, now=lambda: moment) == []
    assert len(collect_lineages(Later(root), dry_run=True, now=lambda: moment)) == 1


def test_a_lineage_that_keeps_all_is_never_touched(training, root, export):
    training.start()
    # Whoever joins with rounds.keep: all keeps the rounds of everybody; the specification is the same.
    training.start(rounds={"keep": "all"})
    training.start(rounds={"keep": "recent"})
    training.work()
    export()
    before = [info.key for info in training.store.list()]
    assert collect_lineages(root) == collect_lineages(root, now=after(1000)) == []
    assert [info.key for info in training.store.list()] == before


def test_a_deleted_model_is_exported_again_while_its_weights_are_there(training, root, export, tmp_path):
    training.start()
    training.work()
    first = export()
    delete_reference(root, first)
    second = export(task="8")
    assert second.key != first.key
    assert export() == second
    assert len(training.store.children("exports")) == 2
    load_directory(root, second, tmp_path / "out")
    delete_reference(root, second)
    with ThreadPoolExecutor(3) as pool:
        exported = list(pool.map(export, ("9", "10", "11")))
    assert exported[0] == exported[1] == exported[2]
    load_directory(root, exported[0], tmp_path / "again")
    collect_lineages(root)
    delete_reference(root, exported[0])
    with pytest.raises(NotFound, match=r"'test' cannot be exported: .* freed its weights"):
        export()


def test_an_export_that_loses_its_weights_to_a_collection_takes_the_record_of_the_other(
    training, root, export, monkeypatch
):
    training.start()
    training.work()
    from metaflow_hf.train import export as module

    write_model, theirs = module.write_model, []

    def overtaken(lineage: Lineage, *arguments, **options):
        monkeypatch.setattr(module, "write_model", write_model)
        theirs.append(export(task="8"))
        collect_lineages(root)
        return write_model(lineage, *arguments, **options)

    monkeypatch.setattr(module, "write_model", overtaken)
    assert export() == theirs[0]
