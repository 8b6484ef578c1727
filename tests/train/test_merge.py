"""Which contributions count when a round is closed."""

import threading
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from metaflow_hf.store import open_store
from metaflow_hf.train.files import PayloadFiles
from metaflow_hf.train.lineage import Lineage
from metaflow_hf.train.merge import Merger
from metaflow_hf.train.outer import average, nesterov
from metaflow_hf.train.records import Delta, Round
from metaflow_hf.train.tensors import TensorWriter, write_all


class Bench:
    """A lineage of one parameter, to which contributions are published by hand."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lineage = Lineage(open_store(root / "store"))
        path = root / "initial"
        digest = write_all(path, {"w": torch.zeros(4)})
        weights = self.lineage.upload_payload(path, "weights", 0, digest)
        self.base = self.lineage.create_round(Round(nonce="0", round=0, parent=None, weights=weights))

    def publish(self, attempt: str, positions, values, *, tokens: int = 10, **changes) -> None:
        path = self.root / attempt
        digest = write_all(path, {"w": torch.tensor(values)})
        payload = self.lineage.upload_delta(path, self.base.number, attempt, digest)
        delta = Delta(
            base=self.base.digest,
            attempt=attempt,
            positions=positions,
            tokens=tokens,
            loss=1.0,
            encoding="fp32",
            tensors=payload,
        )
        self.lineage.publish(self.base.number, msgspec.structs.replace(delta, **changes))

    def merger(self, **settings) -> Merger:
        return Merger(
            lineage=self.lineage,
            files=PayloadFiles(self.lineage.store, self.root / f"scratch{self.base.number}"),
            attempt="closer",
            **{"num_positions": 10, "max_tokens": None, "outer_step": average, **settings},
        )

    def close(self, claims=None, **settings):
        self.base = self.merger(**settings).close(self.base, claims or {})
        return self.base.manifest

    def weights(self) -> list[float]:
        path = self.root / "read"
        self.lineage.store.download(self.base.manifest.weights.key, path)
        return load_file(path)["w"].tolist()


@pytest.fixture
def bench(tmp_path) -> Bench:
    return Bench(tmp_path)


def test_contributions_are_weighted_by_their_tokens(bench):
    bench.publish("a", [(0, 1)], [1.0] * 4, tokens=30)
    bench.publish("b", [(1, 3)], [5.0] * 4, tokens=10)
    manifest = bench.close()
    assert bench.weights() == [2.0] * 4
    assert manifest.done == [(0, 3)]
    assert manifest.tokens == 40
    assert [item.attempt for item in manifest.accepted] == ["a", "b"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"base": "0" * 64}, "started from"),
        ({"positions": [(0, 1), (3, 4)]}, "in the model already or in another"),
        ({"positions": [(5, 50)]}, "not possible"),
        ({"positions": []}, "not possible"),
        ({"encoding": "int8/1024"}, "missing or unknown"),
    ],
)
def test_what_does_not_fit_is_rejected_with_its_reason(bench, changes, reason):
    changes = dict(changes)
    bench.publish("a", [(0, 1)], [1.0] * 4)
    bench.publish("b", changes.pop("positions", [(3, 4)]), [9.0] * 4, **changes)
    manifest = bench.close({0: "a", 3: "b"})
    assert bench.weights() == [1.0] * 4
    assert reason in manifest.rejected["b"]
    assert manifest.done == [(0, 1)]
    assert manifest.failures == {3: 1}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_rejected_and_counted(bench, value):
    bench.publish("a", [(0, 1)], [1.0] * 4)
    bench.publish("b", [(1, 2)], [0.0, value, 0.0, 0.0])
    manifest = bench.close({0: "a", 1: "b"})
    assert bench.weights() == [1.0] * 4
    assert "not finite" in manifest.rejected["b"]
    assert manifest.failures == {1: 1}


def test_damaged_tensors_are_rejected(bench):
    bench.publish("a", [(0, 1)], [1.0] * 4)
    bench.publish("b", [(1, 2)], [2.0] * 4)
    path = bench.root / "store/deltas/0000000000/b.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    manifest = bench.close()
    assert "damaged" in manifest.rejected["b"]
    assert manifest.done == [(0, 1)]


def test_a_position_is_never_taken_twice_over_rounds(bench):
    bench.publish("a", [(0, 2)], [1.0] * 4)
    bench.close()
    bench.publish("b", [(1, 3)], [1.0] * 4)
    manifest = bench.close()
    assert manifest.accepted == []
    assert manifest.done == [(0, 2)]
    assert manifest.empty_rounds == 1


def test_weights_of_the_only_contributor_are_taken_as_they_are(bench):
    bench.publish("a", [(0, 1)], [0.1, 0.2, 0.3, 0.7], encoding="weights")
    bench.close()
    assert bench.weights() == torch.tensor([0.1, 0.2, 0.3, 0.7]).tolist()


def test_an_empty_round_keeps_everything_and_counts_failures(bench):
    manifest = bench.close({4: "dead", 5: "dead"})
    assert manifest.weights.key.startswith("weights/0000000000/")
    assert manifest.failures == {4: 1, 5: 1}
    assert not manifest.final
    assert bench.close({4: "dead"}).failures == {4: 2, 5: 1}
    bench.publish("a", [(4, 5)], [1.0] * 4)
    assert bench.close({4: "a"}).failures == {5: 1}


def test_claims_given_up_unharmed_are_no_failures(bench):
    bench.publish("a", [(0, 1)], [1.0] * 4, released=[(2, 3)], failed=[(3, 4)])
    assert bench.close({0: "a", 2: "a", 3: "a"}).failures == {3: 1}


def test_positions_that_fail_too_often_are_skipped_where_that_is_wanted(bench):
    for _ in range(2):
        manifest = bench.close({4: "dead"}, max_failures=2, skip_failing=True)
    assert manifest.skipped == [(4, 5)]
    bench.publish("a", [(0, 4), (5, 10)], [1.0] * 4)
    assert bench.close().final


def test_all_positions_or_the_budget_of_tokens_make_a_round_final(bench):
    bench.publish("a", [(0, 4)], [1.0] * 4)
    assert not bench.close(max_tokens=11).final
    bench.publish("b", [(4, 5)], [1.0] * 4)
    assert bench.close(max_tokens=11).final


def test_of_two_closers_one_commits_and_both_go_on_with_it(bench):
    bench.publish("a", [(0, 1)], [1.0] * 4)
    first, second = bench.merger(), bench.merger()
    one = first.close(bench.base, {0: "a"})
    bench.publish("late", [(1, 2)], [1.0] * 4)
    two = second.close(bench.base, {0: "a", 1: "late"})
    assert one == two
    assert [item.attempt for item in two.manifest.accepted] == ["a"]


def test_an_absurd_change_is_rejected_and_its_positions_are_trained_again(bench):
    for number, value in enumerate((1.0, 1.5, 0.5)):
        bench.publish(f"good{number}", [(number, number + 1)], [value] * 4)
    bench.publish("flipped", [(3, 4)], [1.0, 1.0, 2.0**90, 1.0])
    manifest = bench.close({0: "good0", 1: "good1", 2: "good2", 3: "flipped"})
    assert bench.weights() == [1.0] * 4
    assert "absurd beside 2, the median" in manifest.rejected["flipped"]
    assert manifest.done == [(0, 3)]
    assert manifest.failures == {3: 1}


def test_values_whose_squares_overflow_are_finite_but_absurd(bench):
    bench.publish("a", [(0, 1)], [1.0] * 4)
    bench.publish("b", [(1, 2)], [3e38] * 4)
    assert "absurd" in bench.close().rejected["b"]


def test_who_trained_more_may_have_moved_further(bench):
    # A thousand steps beside one, all in the same direction; the weights are still small.
    for number in range(3):
        bench.publish(f"slow{number}", [(number, number + 1)], [1e-3] * 4, tokens=10)
    bench.publish("fast", [(3, 9)], [1.0] * 4, tokens=10_000)
    manifest = bench.close()
    assert manifest.rejected == {}
    assert manifest.tokens == 10_030


def test_early_rounds_may_move_weights_further_than_their_own_size(bench):
    bench.publish("a", [(0, 1)], [50.0] * 4)
    bench.publish("b", [(1, 2)], [-70.0] * 4)
    assert bench.close().rejected == {}


@pytest.mark.parametrize(("size", "is_rejected"), [(4.0, False), (400.0, True)])
def test_beside_one_other_a_change_is_absurd_only_if_it_exceeds_the_weights_too(bench, size, is_rejected):
    bench.publish("a", [(0, 1)], [100.0] * 4)
    bench.close()
    # Which of two is wrong cannot be told by comparing them: here one has hardly moved.
    bench.publish("still", [(1, 2)], [0.001] * 4)
    bench.publish("b", [(2, 3)], [size] * 4)
    assert ("b" in bench.close().rejected) == is_rejected


def test_where_most_have_not_moved_the_others_are_not_absurd_for_it(bench):
    bench.publish("a", [(0, 1)], [100.0] * 4)
    bench.close()
    for number in (1, 2):
        bench.publish(f"still{number}", [(number, number + 1)], [0.0] * 4)
    bench.publish("b", [(3, 4)], [5.0] * 4)
    assert bench.close().rejected == {}


def test_the_outer_state_is_that_of_sgd_over_the_rounds(bench):
    parameter = torch.nn.Parameter(torch.zeros(4))
    oracle = torch.optim.SGD([parameter], lr=0.7, momentum=0.6, nesterov=True)
    for number in range(3):
        a, b = torch.randn(2, 4, generator=torch.Generator().manual_seed(number))
        bench.publish("a", [(2 * number, 2 * number + 1)], a.tolist(), tokens=30)
        bench.publish("b", [(2 * number + 1, 2 * number + 2)], b.tolist(), tokens=10)
        manifest = bench.close(outer_step=nesterov(0.7, 0.6))
        parameter.grad = -(0.75 * a + 0.25 * b)
        oracle.step()
        torch.testing.assert_close(torch.tensor(bench.weights()), parameter.detach())
        bench.lineage.store.download(manifest.outer.key, bench.root / "outer")
        momentum = load_file(bench.root / "outer")["w"]
        torch.testing.assert_close(momentum, oracle.state[parameter]["momentum_buffer"])
    before = manifest.outer
    bench.publish("a", [(6, 7)], [1.0] * 4, encoding="weights")
    assert bench.close(outer_step=nesterov(0.7, 0.6)).outer == before, "one contributor leaves it unchanged"


def test_slabs_make_no_difference(bench, monkeypatch):
    monkeypatch.setattr("metaflow_hf.train.delta.SLAB", 2)
    bench.publish("a", [(0, 1)], [1.0, 2.0, 3.0, 4.0])
    bench.publish("b", [(1, 2)], [5.0, 6.0, 7.0, 8.0], encoding="weights")
    bench.close()
    assert bench.weights() == [3.0, 4.0, 5.0, 6.0]


def test_a_merge_that_fails_leaves_no_file_open(bench, monkeypatch):
    def fails(base, changes, tokens, momentum, /):
        calls.append(base)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return base, base

    class Noted(TensorWriter):
        def __init__(self, path, layouts):
            super().__init__(path, layouts)
            writers.append(self)

    calls, writers = [], []
    monkeypatch.setattr("metaflow_hf.train.merge.TensorWriter", Noted)
    for number, attempt in enumerate("ab"):
        bench.publish(attempt, [(number, number + 1)], [1.0] * 4)
    monkeypatch.setattr("metaflow_hf.train.delta.SLAB", 2)
    with pytest.raises(RuntimeError, match="out of memory"):
        bench.close(outer_step=fails)
    assert len(writers) == 2
    assert all(writer._file.closed for writer in writers)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("sha256")]


def test_the_average_is_the_ema_of_the_weights_whatever_the_length_of_rounds(bench):
    half_life = 40
    lengths, values = [40, 10, 30, 20], [1.0, -3.0, 2.0, 5.0]
    expected = None
    for number, (tokens, value) in enumerate(zip(lengths, values, strict=True)):
        bench.publish(f"a{number}", [(number, number + 1)], [value] * 4, tokens=tokens)
        bench.publish(f"b{number}", [(number + 5, number + 6)], [value / 2] * 4, tokens=0)
        manifest = bench.close(ema_half_life=half_life)
        model = torch.nn.Linear(4, 1, bias=False)
        torch.nn.init.constant_(model.weight, bench.weights()[0])
        if expected is None:
            expected = AveragedModel(model)
        # The oracle's decay is fixed for its life.
        expected.multi_avg_fn = get_ema_multi_avg_fn(0.5 ** (tokens / half_life))
        expected.update_parameters(model)
    path = bench.root / "average"
    bench.lineage.store.download(manifest.ema.key, path)
    assert load_file(path)["w"].tolist() == pytest.approx(expected.module.weight.flatten().tolist())
    # Later rounds need it, whatever else is swept.
    bench.lineage.sweep(bench.base)
    assert bench.lineage.store.head(manifest.ema.key)


def test_a_round_that_trained_nothing_leaves_the_average_alone(bench):
    bench.publish("a", [(0, 1)], [1.0] * 4)
    first = bench.close(ema_half_life=10)
    assert first.ema == first.weights
    assert bench.close(ema_half_life=10).ema == first.ema
    assert bench.close().ema == first.ema


def test_the_only_contributor_keeps_the_average_too(bench):
    for number in range(2):
        bench.publish(f"a{number}", [(number, number + 1)], [number + 1.0] * 4, encoding="weights")
        manifest = bench.close(ema_half_life=10)
    path = bench.root / "average"
    bench.lineage.store.download(manifest.ema.key, path)
    assert load_file(path)["w"].tolist() == [1.5] * 4
