"""The notes of small files that have arrived: who goes on after a killed download finds them by it."""

import pytest

from metaflow_hf.hub import arrivals
from metaflow_hf.hub.arrivals import Arrivals
from metaflow_hf.store.manifests import Manifest, ManifestFile

CONTENT = "hub/models--acme--model/0123"


def arrived(number: int) -> ManifestFile:
    sha256 = f"{number:064x}"
    return ManifestFile(f"f{number}", 3, sha256, f"blobs/{sha256[:2]}/{sha256}", oid=f"{number:040x}")


def add(note: Arrivals, file: ManifestFile) -> None:
    note.add(file.path, file.oid, file.digest)


@pytest.fixture
def files() -> list[ManifestFile]:
    return [arrived(number) for number in range(3 * arrivals.FILES_OF_A_NOTE)]


def test_each_of_many_files_is_noted_at_once_and_no_note_grows_large(store, files, monkeypatch):
    sizes, put = [], store.put
    monkeypatch.setattr(type(store), "put", lambda _, key, data: (sizes.append(len(data)), put(key, data)))
    note = Arrivals(store, CONTENT)
    for count, file in enumerate(files, start=1):
        add(note, file)
        if count % 50 == 0:
            assert len(Arrivals(store, CONTENT).read()) == count
    assert max(sizes) < 20_000
    assert len(list(store.list("arrivals"))) == 3


def test_who_goes_on_finds_what_was_noted_before_and_clears_it_with_its_own(store, files):
    add(Arrivals(store, CONTENT), files[0])
    second = Arrivals(store, CONTENT)
    assert second.read() == [files[0]]
    add(second, files[1])
    third = Arrivals(store, CONTENT)
    assert {file.path for file in third.read()} == {"f0", "f1"}
    # Another selection of the commit needs it still.
    third.clear(Manifest(files=(files[1],)))
    assert Arrivals(store, CONTENT).read() == [files[0]]
    third.clear(Manifest(files=(files[0],)))
    assert list(store.list("arrivals")) == []


def test_a_damaged_note_costs_a_download_and_nothing_else(store, files, caplog):
    add(Arrivals(store, CONTENT), files[0])
    [info] = store.list("arrivals")
    store.put(info.key, store.get(info.key)[:-9])
    assert Arrivals(store, CONTENT).read() == []
    assert "downloaded again" in caplog.text
