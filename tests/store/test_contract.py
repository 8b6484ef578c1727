"""What every store promises, asked of memory, local disk and S3 alike."""

import hashlib
import multiprocessing
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from metaflow_hf.errors import IntegrityError, NotFound, SelectionError
from metaflow_hf.store import Digest, ObjectStore, open_store, probe


def _create_all(location: str, writer: int, keys: int, barrier, results) -> None:
    store = open_store(location)
    barrier.wait()
    won = []
    for key in range(keys):
        # Long enough that a torn object would be seen.
        data = f"{writer}:{key}:".encode() + bytes([writer]) * 4096
        outcome = store.create(f"race/{key:04d}", data)
        if outcome.created:
            won.append(key)
        else:
            assert len(outcome.content) >= 4096
            assert len(set(outcome.content[-4096:])) == 1, "a reader saw a part of an object"
    results.put((writer, won))


@pytest.mark.parametrize("kind", ["disk", "s3"])
def test_create_has_exactly_one_winner_among_8_processes(kind, tmp_path, request):
    location = str(tmp_path / "store") if kind == "disk" else request.getfixturevalue("s3_root")
    keys = 60 if kind == "disk" else 12
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(8), context.Queue()
    writers = [
        context.Process(target=_create_all, args=(location, n, keys, barrier, results)) for n in range(8)
    ]
    for writer in writers:
        writer.start()
    won = dict(results.get(timeout=100) for _ in writers)
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0

    winners = sorted(key for keys_won in won.values() for key in keys_won)
    assert winners == list(range(keys))
    store = open_store(location)
    for writer, keys_won in won.items():
        for key in keys_won:
            expected = f"{writer}:{key}:".encode() + bytes([writer]) * 4096
            assert store.get(f"race/{key:04d}") == expected


def test_create_has_exactly_one_winner_among_threads(store: ObjectStore):
    barrier = threading.Barrier(8)
    won: list[int] = []

    def create(n: int) -> None:
        barrier.wait()
        if store.create("race/key", f"{n}".encode()).created:
            won.append(n)

    threads = [threading.Thread(target=create, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.get("race/key") == f"{won[0]}".encode()


def test_create_tells_what_the_key_holds(store: ObjectStore):
    assert store.create("a/b", b"first").created
    second = store.create("a/b", b"second")
    assert (second.created, second.content) == (False, b"first")
    # A retry that meets its own first try has won.
    assert store.create("a/b", b"first").created


def test_put_overwrites_and_readers_never_see_a_mixture(store: ObjectStore):
    sizes = {65: 200_000, 66: 300_001}
    store.put("x", bytes([65]) * sizes[65])
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for byte, size in sizes.items():
                store.put("x", bytes([byte]) * size)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(30):
            content = store.get("x")
            assert len(set(content)) == 1
            assert len(content) == sizes[content[0]]
    finally:
        stop.set()
        writer.join()


def test_get_range(store: ObjectStore):
    store.put("r", b"0123456789")
    assert store.get_range("r", 2, 5) == b"234"
    assert store.get_range("r", 8, 50) == b"89"
    assert store.get_range("r", 10, 12) == b""
    assert store.get_range("r", 4, 4) == b""
    with pytest.raises(ValueError, match="no range"):
        store.get_range("r", 5, 2)


@pytest.mark.parametrize("read", ["get", "head", "get_range", "empty_range", "download"])
def test_missing_is_not_found(store: ObjectStore, read: str, tmp_path: Path):
    target = tmp_path / "target"
    reads = {
        "get": lambda: store.get("no/such"),
        "head": lambda: store.head("no/such"),
        "get_range": lambda: store.get_range("no/such", 0, 4),
        "empty_range": lambda: store.get_range("no/such", 4, 4),
        "download": lambda: store.download("no/such", target),
    }
    with pytest.raises(NotFound, match="no/such"):
        reads[read]()
    assert list(tmp_path.glob("*target*")) == []


def test_head_and_list_carry_the_stores_own_time(store: ObjectStore):
    store.put("t/1", b"abc")
    info = store.head("t/1")
    assert (info.key, info.size) == ("t/1", 3)
    assert abs(info.last_modified - datetime.now(UTC)) < timedelta(minutes=1)
    # S3 lists and heads with different precision.
    (listed,) = store.list("t")
    assert (listed.key, listed.size) == ("t/1", 3)
    assert abs(listed.last_modified - info.last_modified) < timedelta(seconds=1)


def test_list_is_ordered_and_bounded_by_its_prefix(store: ObjectStore):
    for key in ("p/2", "p/10", "p/1", "p/sub/3", "pp/4", "q"):
        store.put(key, b"")
    assert [info.key for info in store.list("p")] == ["p/1", "p/10", "p/2", "p/sub/3"]
    assert [info.key for info in store.list("p", after="p/10")] == ["p/2", "p/sub/3"]
    assert len(list(store.list())) == 6
    assert list(store.list("nothing/here")) == []
    assert store.children("p") == ["1", "10", "2", "sub"]
    assert store.children() == ["p", "pp", "q"]
    assert store.children("nothing") == []


def test_list_pages_over_2500_keys(location: str, store: ObjectStore):
    from concurrent.futures import ThreadPoolExecutor

    keys = [f"many/{n:05d}" for n in range(2_500)]
    # Only the listing is under test: on disk, skip the fsyncs.
    if "://" not in location:
        (Path(location) / "many").mkdir()
        for key in keys:
            (Path(location) / key).write_bytes(b"")
    else:
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda key: store.put(key, b""), keys))
    assert [info.key for info in store.list("many")] == keys
    assert [info.key for info in store.list("many", after=keys[1_499])] == keys[1_500:]


def test_delete(store: ObjectStore):
    store.put("d", b"1")
    store.delete("d")
    store.delete("d")
    with pytest.raises(NotFound):
        store.get("d")
    assert store.create("d", b"2").created


@pytest.mark.parametrize("size", [0, 10, 8 * 1024 * 1024, 20_000_003])
def test_upload_and_download_stream_with_their_sha256(store: ObjectStore, tmp_path: Path, size: int):
    source, target = tmp_path / "source", tmp_path / "deep" / "target"
    data = (b"%d" % size + bytes(range(256)) * (size // 256 + 1))[:size]
    source.write_bytes(data)
    expected = Digest(sha256=hashlib.sha256(data).hexdigest(), size=size)

    assert store.upload(source, "blob", expected=expected) == expected
    assert store.head("blob").size == size
    assert store.download("blob", target, expected=expected) == expected
    assert target.read_bytes() == data
    assert [p.name for p in target.parent.iterdir()] == ["target"]


@pytest.mark.parametrize("size", [10, 20_000_003])
def test_an_upload_of_other_bytes_leaves_nothing(store: ObjectStore, tmp_path: Path, size: int):
    source = tmp_path / "source"
    source.write_bytes(b"x" * size)
    with pytest.raises(IntegrityError, match="source"):
        store.upload(source, "blob", expected=Digest(sha256="0" * 64, size=size))
    with pytest.raises(NotFound):
        store.head("blob")


def test_a_download_of_other_bytes_leaves_nothing(store: ObjectStore, tmp_path: Path):
    store.put("blob", b"right")
    expected = Digest(sha256=hashlib.sha256(b"right").hexdigest(), size=5)
    store.put("blob", b"wrong")
    with pytest.raises(IntegrityError, match="blob"):
        store.download("blob", tmp_path / "target", expected=expected)
    assert not (tmp_path / "target").exists()


def test_child_is_the_same_store_deeper(store: ObjectStore):
    child = store.child("a").child("b")
    child.put("c", b"1")
    assert store.get("a/b/c") == b"1"
    assert [info.key for info in child.list()] == ["c"]
    assert child.uri == f"{store.uri}/a/b"


@pytest.mark.parametrize(
    "part", ["refs%2Fpr", "user:root", "a@b", "c+d=e", "f~g", "h,i", "!2F", "ü", "sp ace"]
)
def test_unusual_characters_survive(store: ObjectStore, part: str):
    store.put(f"odd/{part}/x", b"1")
    assert store.get(f"odd/{part}/x") == b"1"
    assert [info.key for info in store.list("odd")] == [f"odd/{part}/x"]
    assert store.children("odd") == [part]


@pytest.mark.parametrize(
    "key", ["", "/a", "a//b", "a/", "../a", "a/./b", "a\\b", "a\0b", "a\nb", "x#1", "k" * 1001]
)
def test_malformed_keys_are_refused(store: ObjectStore, key: str):
    with pytest.raises(SelectionError, match="usable object key"):
        store.put(key, b"")


def test_probe_shows_atomic_creation_once(store: ObjectStore):
    probe(store)
    before = [info.key for info in store.list()]
    probe(store)
    assert [info.key for info in store.list()] == before == ["probe/ok"]
