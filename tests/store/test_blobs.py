"""Bytes are stored once, under their sha256, on every kind of store."""

import json
from pathlib import Path

import pytest

from metaflow_hf.errors import IntegrityError, NotFound, SelectionError
from metaflow_hf.store.blobs import Blobs, blob_key, has_blob, hash_file, put_blob
from metaflow_hf.store.manifests import Manifest, ManifestFile, condemned_files, publish, read_manifest
from metaflow_hf.store.models import load_directory
from metaflow_hf.store.node_cache import NodeCache
from metaflow_hf.store.objects import Digest, ObjectStore


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"some bytes" * 1000)
    return path


def entry(store: ObjectStore, file: Path, path: str = "a.bin") -> ManifestFile:
    digest = hash_file(file)
    return ManifestFile(path=path, size=digest.size, sha256=digest.sha256, blob=put_blob(store, file, digest))


def test_a_blob_is_stored_once(store: ObjectStore, file: Path, tmp_path: Path):
    digest = hash_file(file)
    assert not has_blob(store, digest)
    key = put_blob(store, file, digest)
    assert key == f"blobs/{digest.sha256[:2]}/{digest.sha256}"
    written = store.head(key).last_modified
    assert put_blob(store, file, digest) == key
    assert store.head(key).last_modified == written
    assert store.download(key, tmp_path / "back", expected=digest) == digest


def test_a_file_that_is_not_what_it_should_be_is_not_stored(store: ObjectStore, file: Path):
    wrong = Digest(sha256="0" * 64, size=file.stat().st_size)
    with pytest.raises(IntegrityError):
        put_blob(store, file, wrong)
    assert not has_blob(store, wrong)


def test_a_truncated_blob_is_stored_again(store: ObjectStore, file: Path, tmp_path: Path):
    digest = hash_file(file)
    store.put(blob_key(digest.sha256), b"some")
    assert not has_blob(store, digest)
    store.download(put_blob(store, file, digest), tmp_path / "back", expected=digest)


def test_a_condemned_blob_is_never_used_again(store: ObjectStore, file: Path):
    digest = hash_file(file)
    first = put_blob(store, file, digest)
    store.create(f"gc/condemned/{first}", b"{}")
    assert Blobs(store).find(digest) is None
    second = put_blob(store, file, digest)
    assert second == f"{first}.1"
    store.create(f"gc/condemned/{second}", b"{}")
    assert put_blob(store, file, digest) == f"{first}.2"


def test_a_blob_condemned_in_the_meantime_is_noticed(store: ObjectStore, file: Path):
    manifest = Manifest(files=(entry(store, file),))
    assert condemned_files(store, manifest) == []
    store.create(f"gc/condemned/{manifest.files[0].blob}", b"{}")
    assert condemned_files(store, manifest) == list(manifest.files)


def test_a_manifest_is_canonical_and_reads_back(store: ObjectStore, file: Path):
    one, two = entry(store, file, "a.bin"), entry(store, file, "b/c.bin")
    manifest = Manifest(files=(two, one), about={"type": "model", "label": "ü"})
    assert manifest == Manifest(files=(one, two), about={"label": "ü", "type": "model"})
    publish(store, "models/x.json", manifest)
    assert read_manifest(store, "models/x.json", digest=manifest.digest) == manifest
    assert manifest.size == 2 * one.size


def test_publishing_again_gives_what_readers_see(store: ObjectStore, file: Path, tmp_path: Path):
    manifest = Manifest(files=(entry(store, file),), about={"label": "first"})
    publish(store, "m.json", manifest)
    again = publish(store, "m.json", Manifest(files=manifest.files, about={"label": "second"}))
    assert again.about == {"label": "first"}
    (tmp_path / "other").write_bytes(b"other")
    with pytest.raises(IntegrityError, match="other files"):
        publish(store, "m.json", Manifest(files=(entry(store, tmp_path / "other"),)))


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b'{"schema":1,"files":[{}],"about":{}}', b'{"schema":9,"files":[],"about":{}}'],
)
def test_a_damaged_manifest_names_its_key(store: ObjectStore, content: bytes):
    store.put("m.json", content)
    with pytest.raises(IntegrityError, match=r"m\.json"):
        read_manifest(store, "m.json")


def test_a_hostile_name_in_a_manifest_is_refused(store: ObjectStore, file: Path):
    manifest = Manifest(files=(entry(store, file, "harmless"),))
    store.put("m.json", manifest.to_bytes().replace(b"harmless", b"../../up"))
    with pytest.raises(SelectionError, match="refused"):
        read_manifest(store, "m.json")


@pytest.mark.parametrize(
    "tampered",
    [
        {"sha256": "../../../secret"},
        {"sha256": "A" * 64},
        {"blob": "pins/another/object"},
        {"blob": f"blobs/00/{'0' * 64}"},
        {"blob": "../../../secret"},
        {"size": -1},
        {"oid": "../../../secret"},
        {"oid": 7},
    ],
)
def test_a_tampered_manifest_leads_nowhere_else(store: ObjectStore, file: Path, tmp_path: Path, tampered):
    secret = tmp_path / "secret"
    secret.write_bytes(file.read_bytes())
    value = json.loads(Manifest(files=(entry(store, file),)).to_bytes())
    value["files"][0] |= tampered
    store.put("m.json", json.dumps(value).encode())
    with pytest.raises(IntegrityError, match=r"m\.json is damaged"):
        load_directory(store, "m.json", tmp_path / "out", cache=NodeCache(tmp_path / "node"), verify="never")
    assert secret.exists()
    assert not (tmp_path / "out").exists()


def test_a_manifest_that_is_not_the_one_referred_to(store: ObjectStore, file: Path):
    publish(store, "m.json", Manifest(files=(entry(store, file),)))
    with pytest.raises(IntegrityError, match="not the one"):
        read_manifest(store, "m.json", digest="0" * 64)
    with pytest.raises(NotFound):
        read_manifest(store, "none.json")
