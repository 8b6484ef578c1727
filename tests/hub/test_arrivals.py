"""The note of small files that are stored already: who goes on after a killed download finds them by it."""

import pytest

from metaflow_hf.hub import arrivals
from metaflow_hf.hub.arrivals import Arrivals
from metaflow_hf.store.manifests import ManifestFile

CONTENT = "hub/models--acme--model/0123"


def stored(number: int) -> ManifestFile:
    sha256 = f"{number:064x}"
    return ManifestFile(f"f{number}", 3, sha256, f"blobs/{sha256[:2]}/{sha256}", oid=f"{number:040x}")


@pytest.fixture
def files() -> list[ManifestFile]:
    return [stored(number) for number in range(200)]


def test_of_few_files_each_is_noted_at_once(store, files):
    note = Arrivals(store, CONTENT)
    for count, file in enumerate(files[: arrivals.FORGOTTEN], start=1):
        note.add(file)
        assert len(Arrivals(store, CONTENT).read()) == count


def test_of_many_nearly_all_are_noted_by_few_writes(store, files, monkeypatch):
    writes, put = [], store.put
    monkeypatch.setattr(type(store), "put", lambda _, key, data: (writes.append(key), put(key, data)))
    note = Arrivals(store, CONTENT)
    for file in files:
        note.add(file)
    assert len(Arrivals(store, CONTENT).read()) > len(files) * (1 - 1 / arrivals.FORGOTTEN)
    assert len(writes) < len(files) / 2


def test_who_goes_on_keeps_what_was_noted_before(store, files):
    first = Arrivals(store, CONTENT)
    first.add(files[0])
    second = Arrivals(store, CONTENT)
    assert second.read() == [files[0]]
    second.add(files[1])
    third = Arrivals(store, CONTENT)
    assert {file.path for file in third.read()} == {"f0", "f1"}
    third.clear()
    assert Arrivals(store, CONTENT).read() == []


def test_a_damaged_note_costs_a_download_and_nothing_else(store, files, caplog):
    note = Arrivals(store, CONTENT)
    note.add(files[0])
    [info] = store.list("arrivals")
    store.put(info.key, store.get(info.key)[:-9])
    assert Arrivals(store, CONTENT).read() == []
    assert "downloaded again" in caplog.text
    Arrivals(store, CONTENT).add(files[1])
    assert Arrivals(store, CONTENT).read() == [files[1]]
