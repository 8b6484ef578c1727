"""Several workers make one model; checked from the store's content alone, by code that shares none of ours."""

import hashlib
import itertools
import json
import threading

import pytest
import torch
from safetensors.torch import load_file

from metaflow_hf.events import RoundClosed


@pytest.fixture
def run_threads(training):
    def run(count: int, **arguments):
        errors: list[BaseException] = []

        def work() -> None:
            try:
                training.work(**arguments)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(100)
        if errors:
            raise errors[0]

    return run


def read_chain(root):
    """The manifests in order, each checked against the bytes of the one before."""
    chain, parent = [], None
    for number, path in enumerate(sorted((root / "rounds").glob("*.json"))):
        content = path.read_bytes()
        manifest = json.loads(content)
        assert manifest["round"] == number
        assert manifest["parent"] == parent
        parent = hashlib.sha256(content).hexdigest()
        chain.append((manifest, parent))
    return chain


def positions(ranges):
    return [position for start, stop in ranges for position in range(start, stop)]


def assert_exactly_once(chain, num_positions):
    seen: list[int] = []
    for manifest, _ in chain[1:]:
        seen += [p for item in manifest["accepted"] for p in positions(item["positions"])]
        assert sorted(seen) == positions(manifest["done"])
    assert sorted(seen) == list(range(num_positions))
    assert [manifest["final"] for manifest, _ in chain] == [False] * (len(chain) - 1) + [True]


def load(root, payload):
    path = root / payload["key"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == payload["digest"]
    return load_file(path)


def change_of(root, round_number, item, base):
    record = json.loads((root / f"deltas/{round_number:010d}/{item['attempt']}.json").read_text())
    tensors = load(root, record["tensors"])
    if record["encoding"] == "weights":
        return {name: tensors[name] - base[name] for name in base}
    if record["encoding"] == "fp32":
        return tensors
    change = {}
    for name, value in base.items():
        flat = torch.zeros(value.numel())
        quantised, scales = tensors[name].flatten(), tensors[f"{name}#scale"]
        for block, scale in enumerate(scales):
            part = slice(block * 1024, (block + 1) * 1024)
            flat[part] = quantised[part].float() * scale
        change[name] = flat.view(value.shape)
    return change


def recompute(root, chain):
    """Every round's weights from the deltas that it accepted, with an outer step written down once more."""
    merged = 0
    momentum: dict[str, torch.Tensor] = {}
    for (before, _), (after, _) in itertools.pairwise(chain):
        base, stored = load(root, before["weights"]), load(root, after["weights"])
        accepted = after["accepted"]
        if not accepted:
            assert before["weights"] == after["weights"]
            continue
        records = [
            json.loads((root / f"deltas/{before['round']:010d}/{item['attempt']}.json").read_text())
            for item in accepted
        ]
        if len(records) == 1 and records[0]["encoding"] == "weights":
            exact = load(root, records[0]["tensors"])
            assert all(torch.equal(exact[name], stored[name]) for name in stored)
            continue
        merged += 1
        total = sum(item["tokens"] for item in accepted)
        changes = [change_of(root, before["round"], item, base) for item in accepted]
        for name, value in base.items():
            mean = sum(
                change[name] * (item["tokens"] / total)
                for change, item in zip(changes, accepted, strict=True)
            )
            momentum[name] = 0.6 * momentum.get(name, 0.0) - mean
            expected = value - 0.7 * (-mean + 0.6 * momentum[name])
            torch.testing.assert_close(stored[name], expected, rtol=1e-6, atol=1e-7)
    return merged


@pytest.mark.parametrize("encoding", ["fp32", "int8"])
def test_two_workers_train_every_position_once_and_the_weights_are_the_merged_deltas(
    training, run_threads, tmp_path, encoding
):
    spec = training.start(data={"epochs": 3}, rounds={"workers": 2, "encoding": encoding, "seconds": 0.1})
    run_threads(2)
    root = tmp_path / "store"
    chain = read_chain(root)
    assert_exactly_once(chain, spec.num_positions)
    assert recompute(root, chain) >= 1
    assert chain[-1][0]["outer"] is not None


def test_one_worker_trains_the_start_alone(training, run_threads, tmp_path):
    training.start(rounds={"workers": 3, "solo_start": 0.5, "seconds": 0.05})
    run_threads(3)
    chain = read_chain(tmp_path / "store")
    solo = [m for m, _ in chain[1:] if len(positions(m["done"])) <= 0.5 * 18]
    assert solo
    assert {len(manifest["accepted"]) for manifest in solo} == {1}
    assert len({manifest["accepted"][0]["attempt"] for manifest in solo}) == 1
    assert_exactly_once(chain, 18)


def test_old_rounds_are_swept_and_the_newest_stays_complete(training, run_threads, tmp_path):
    training.start(rounds={"workers": 2, "keep": "recent", "seconds": 0.05})
    run_threads(2)
    root = tmp_path / "store"
    chain = read_chain(root)
    newest = chain[-1][0]
    numbers = {int(path.name) for path in (root / "weights").iterdir() if any(path.rglob("*.safetensors"))}
    named = {int(m["weights"]["key"].split("/")[1]) for m, _ in chain[-2:]}
    assert len(chain) > 4
    assert named <= numbers
    assert all(number in named or number > newest["round"] - 2 for number in numbers)
    load(root, newest["weights"])


def test_everybody_hears_of_every_round_they_took_part_in(training, run_threads):
    events = []
    training.start(data={"epochs": 3}, rounds={"workers": 2, "seconds": 0.05})
    run_threads(2, on_event=events.append)
    closed = [event for event in events if isinstance(event, RoundClosed)]
    final = [event for event in closed if event.final]
    assert len({event.worker for event in final}) == 2
    assert {event.positions_done for event in final} == {54}
