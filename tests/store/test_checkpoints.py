"""Checkpoints as objects: numbering, names, and which one an attempt goes on from."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from metaflow_hf.errors import NotFound, SelectionError
from metaflow_hf.store.branches import branch_value, task_identifier
from metaflow_hf.store.checkpoints import (
    CheckpointTask,
    checkpoint_reference,
    find_checkpoints,
    inherit_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from metaflow_hf.store.models import delete_reference, load_directory
from metaflow_hf.store.node_cache import NodeCache

WHO = CheckpointTask(flow="FlowX", run="12", step="train", task="7", namespace="user:me", identifier="abc")


@pytest.fixture
def state(tmp_path: Path) -> Path:
    path = tmp_path / "state.pt"
    path.write_bytes(b"weights")
    return path


def newest(store, who, *, any_run=False):
    found = newest_checkpoint(store, who, any_run=any_run)
    return found and found.version


def test_versions_count_per_identifier_and_bytes_are_stored_once(store, state: Path):
    references = [save_checkpoint(store, state, WHO, metadata={"step": n}) for n in range(3)]
    other = save_checkpoint(store, state, replace(WHO, identifier="other", task="8"))
    assert [reference.version for reference in references] == [1, 2, 3]
    assert other.version == 1
    prefix = "checkpoints/FlowX/train/user:me"
    assert references[2].key == f"{prefix}/abc/00000003--12--7--0--mfchckpt.json"
    assert references[2].metadata == {"step": 2}
    assert references[2].pathspec == "FlowX/12/train/7"
    assert len(list(store.list("blobs"))) == 1
    assert checkpoint_reference(store, references[1].key) == references[1]


def test_savers_at_once_get_versions_of_their_own(store, state: Path):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: save_checkpoint(store, state, WHO, metadata={"n": n}), range(8)))
    assert sorted(reference.version for reference in found) == list(range(1, 9))
    assert sorted(reference.metadata["n"] for reference in found) == list(range(8))


def test_a_resumed_loop_takes_the_checkpoint_of_the_same_iteration_only(store, state: Path):
    save_checkpoint(store, state, replace(WHO, task="1", iteration=0))
    save_checkpoint(store, state, replace(WHO, task="2", iteration=1))
    resumed = replace(WHO, run="13", origin_run="12", task="5")
    assert newest(store, replace(resumed, iteration=1)) == 2
    assert newest(store, replace(resumed, iteration=0)) == 1
    # Iterations that the first run did not reach begin as they would have there.
    assert newest(store, replace(resumed, iteration=2)) is None
    assert newest(store, replace(resumed, iteration=2), any_run=True) == 2


@pytest.mark.parametrize("name", ["best.loss.0.5", "a--b", "x/y", "épo che", "."])
def test_names_of_any_kind(store, state: Path, tmp_path: Path, name: str):
    who = replace(WHO, run="argo-a--b", task="t--1")
    reference = save_checkpoint(store, state, who, name=name)
    assert reference.name == name
    [key] = find_checkpoints(store, who.prefix)
    assert key.is_of("argo-a--b", "t--1")
    assert not key.is_of("argo-a", "t--1")
    loaded = load_directory(
        store, json.loads(json.dumps(reference.to_json())), cache=NodeCache(tmp_path / "n")
    )
    assert (loaded / "state.pt").read_bytes() == b"weights"


def test_what_cannot_be_saved_is_said_and_nothing_is_visible(store, state: Path, tmp_path: Path):
    for arguments, words in (
        ({"name": ""}, "name of a checkpoint"),
        ({"name": "x" * 200}, "name of a checkpoint"),
        ({"metadata": {"x": {1}}}, "must be JSON"),
    ):
        with pytest.raises(SelectionError, match=words):
            save_checkpoint(store, state, WHO, **arguments)
    with pytest.raises(SelectionError, match="nothing to save"):
        save_checkpoint(store, tmp_path / "none", WHO)
    assert list(store.list()) == []


def test_a_retry_goes_on_from_its_own_newest(store, state: Path):
    assert newest(store, WHO) is None
    save_checkpoint(store, state, WHO)
    save_checkpoint(store, state, replace(WHO, task="8"))
    assert newest(store, replace(WHO, attempt=1)) == 1
    save_checkpoint(store, state, replace(WHO, attempt=1))
    assert newest(store, replace(WHO, attempt=2)) == 3
    save_checkpoint(store, state, replace(WHO, attempt=1), latest=False)
    assert newest(store, replace(WHO, attempt=2)) == 3


def test_a_resumed_run_goes_on_from_its_origin_and_a_new_one_only_if_it_is_eager(store, state: Path):
    save_checkpoint(store, state, WHO)
    resumed = replace(WHO, run="13", task="1", origin_run="12")
    new = replace(WHO, run="14", task="1")
    assert newest(store, resumed) == 1
    assert newest(store, new) is None
    assert newest(store, new, any_run=True) == 1
    assert newest(store, replace(new, identifier="other"), any_run=True) is None
    assert newest(store, replace(new, namespace=""), any_run=True) is None
    save_checkpoint(store, state, resumed)
    save_checkpoint(store, state, new)
    assert newest(store, resumed, any_run=True) == 2


def test_a_resumed_run_that_dies_early_can_be_resumed(store, state: Path, tmp_path: Path):
    original = save_checkpoint(store, state, WHO, name="best.1", metadata={"step": 5})
    resumed = replace(WHO, run="13", task="1", origin_run="12")
    inherit_checkpoint(store, original, resumed)
    delete_reference(store, original.to_json())
    again = newest_checkpoint(store, replace(WHO, run="14", task="9", origin_run="13"), any_run=False)
    assert again is not None
    assert (again.name, again.metadata, again.pathspec) == ("best.1", {"step": 5}, "FlowX/13/train/1")
    loaded = load_directory(store, again, cache=NodeCache(tmp_path / "n"))
    assert (loaded / "state.pt").read_bytes() == b"weights"
    assert len(list(store.list("blobs"))) == 1


def test_a_deleted_checkpoint_is_not_gone_on_from(store, state: Path):
    first, second = (save_checkpoint(store, state, WHO) for _ in range(2))
    delete_reference(store, second.to_json())
    assert newest(store, WHO) == first.version
    with pytest.raises(NotFound):
        checkpoint_reference(store, second.key)


def test_identifiers_are_of_the_values_whatever_they_are():
    class Custom:
        def __reduce__(self):
            return (complex, (1, 2))

    branches = [["a"], ["b"], [1], ["1"], [{"lr": 0.1}], [{1, 2}], [b"x"], [None], [float("nan")], [Custom()]]
    branches += [["a", 1], ["a", 2]]
    identifiers = [task_identifier(values) for values in branches]
    assert len(set(identifiers)) == len(branches)
    assert task_identifier([{"b": 1, "a": 2}]) == task_identifier([{"a": 2, "b": 1}])
    assert task_identifier([]) == ""


SET_OF_NAMES = """
from metaflow_hf.store.branches import task_identifier
print(task_identifier([{"alpha", "beta", "gamma", "delta"}, (frozenset({"x", "y", "z"}), b"")]))
"""


def test_a_set_has_the_same_identifier_in_every_process(subprocess_environment):
    found = {
        subprocess.run(
            [sys.executable, "-c", SET_OF_NAMES],
            env={**subprocess_environment, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            check=True,
        ).stdout
        for seed in range(1, 4)
    }
    assert len(found) == 1


def test_values_that_cannot_be_pickled_count_by_their_index():
    values = [lambda: 1, lambda: 2, None, 0, open(__file__, "rb")]  # noqa: SIM115
    values[-1].close()
    identifiers = {task_identifier([branch_value(index, value)]) for index, value in enumerate(values)}
    assert len(identifiers) == len(values)
    assert branch_value(3, 0) == 0


def test_equal_versions_of_two_savers_are_both_kept_and_ordered(store, state: Path):
    # Each looked before the other had saved: a zombie of the first attempt, the second, and another branch.
    savers = [replace(WHO, attempt=1), WHO, replace(WHO, task="8")]
    late = [Looked(store) for _ in savers]
    saved = [save_checkpoint(seen, state, who) for seen, who in zip(late, savers, strict=True)]
    assert {reference.version for reference in saved} == {1}
    found = sorted(find_checkpoints(store, WHO.prefix), key=lambda key: key.order)
    assert [key.key for key in found] == [saved[1].key, saved[2].key, saved[0].key]
    assert newest_checkpoint(store, replace(WHO, attempt=2), any_run=False) == saved[0]
    assert newest_checkpoint(store, replace(WHO, task="8", attempt=1), any_run=False) == saved[2]
    assert save_checkpoint(store, state, WHO).version == 2


class Looked:
    """A store as a writer sees it who listed the checkpoints before anyone had saved one."""

    def __init__(self, inner) -> None:
        self._inner = inner

    def __getattr__(self, name: str):
        return getattr(self._inner, name)

    def list(self, prefix: str = "", **keywords):
        return iter(()) if prefix.startswith("checkpoints/") else self._inner.list(prefix, **keywords)


def test_the_global_namespace_and_single_tasks_have_readable_keys(store, state: Path):
    reference = save_checkpoint(store, state, replace(WHO, namespace="", identifier=""))
    assert reference.key.startswith("checkpoints/FlowX/train/_global/_single/00000001--12--7--0--")
