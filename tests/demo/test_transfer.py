"""Ranges, and what the client sees when the hub falters: each fault is scheduled."""

import os
import socket
import struct
import threading
import time
import urllib.request
from pathlib import Path
from urllib.parse import quote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from metaflow_hf.demo.content import HubContent

DATA = bytes(range(256)) * 8192  # 2 MiB: by LFS


@pytest.fixture
def files_hub(start_hub):
    return start_hub(content_of({"weights.safetensors": DATA, "config.json": b'{"a": 1}', "empty.txt": b""}))


def content_of(files) -> HubContent:
    content = HubContent()
    content.add("x/files", files)
    return content


def get(url: str, **headers: str):
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
            return answer.status, answer.read(), answer.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(), error.headers


def eventually(is_true, seconds: float = 60.0) -> bool:
    """Whether this becomes true: for what the server does after its answer."""
    until = time.monotonic() + seconds
    while not is_true() and time.monotonic() < until:
        time.sleep(0.01)
    return is_true()


@pytest.mark.parametrize("name", ["config.json", "weights.safetensors"])
@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [("bytes=2-4", 2, 5), ("bytes=5-", 5, None), ("bytes=-3", -3, None), ("bytes=0-99999999", 0, None)],
)
def test_a_range_is_answered_by_exactly_these_bytes(files_hub, name, asked, start, stop):
    whole = get(f"{files_hub.url}/x/files/resolve/main/{name}")[1]
    status, body, headers = get(f"{files_hub.url}/x/files/resolve/main/{name}", Range=asked)
    assert (status, body) == (206, whole[start:stop])
    assert headers["Content-Range"].endswith(f"/{len(whole)}")


def test_a_range_outside_the_file_is_refused(files_hub):
    status, _, headers = get(f"{files_hub.url}/x/files/resolve/main/config.json", Range="bytes=8-")
    assert status == 416
    assert headers["Content-Range"] == "bytes */8"


def test_an_empty_file_is_a_file(files_hub):
    path = huggingface_hub.hf_hub_download("x/files", "empty.txt")
    assert Path(path).read_bytes() == b""


def test_a_download_cut_short_goes_on_where_it_stopped(files_hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 100_000)  # written piece by piece
    files_hub.faults.truncate_next(after_bytes=1_000_000, path="*weights.safetensors")
    path = huggingface_hub.hf_hub_download("x/files", "weights.safetensors")

    assert Path(path).read_bytes() == DATA
    first, second = files_hub.log.entries("GET", "/lfs/*")
    assert (first.range, first.body_bytes) == (None, 1_000_000)
    assert (second.range, second.body_bytes) == ("bytes=1000000-", len(DATA) - 1_000_000)


def test_wrong_bytes_of_the_right_size_reach_the_client(files_hub):
    """huggingface_hub checks sizes only: whoever wants the right bytes must hash."""
    files_hub.faults.corrupt_next(path="*weights.safetensors")
    path = huggingface_hub.hf_hub_download("x/files", "weights.safetensors")
    assert os.path.getsize(path) == len(DATA)
    assert Path(path).read_bytes() != DATA


def test_a_failing_hub_is_an_error_of_that_status_and_recovers(files_hub):
    files_hub.faults.fail_next(2, status=500, path="/api/*")
    for _ in range(2):
        with pytest.raises(HfHubHTTPError) as caught:
            HfApi().model_info("x/files")
        assert caught.value.response.status_code == 500
    assert HfApi().model_info("x/files").id == "x/files"


def test_too_many_requests_say_when_to_come_back(files_hub):
    files_hub.faults.fail_next(status=429, retry_after_seconds=1, path="*/tree/*")
    began = time.monotonic()
    assert len(list(HfApi().list_repo_tree("x/files"))) == 3
    assert time.monotonic() - began >= 1
    assert [e.status for e in files_hub.log.entries(path="*/tree/*")] == [429, 200]


def test_a_dropped_connection_has_no_answer(files_hub):
    files_hub.faults.drop_next(path="/x/files/*", method="GET")
    with pytest.raises((ConnectionError, urllib.error.URLError)):
        get(f"{files_hub.url}/x/files/resolve/main/config.json")
    assert get(f"{files_hub.url}/x/files/resolve/main/config.json")[0] == 200


def test_a_delayed_answer_is_late_but_whole(files_hub):
    files_hub.faults.delay_next(seconds=0.2, path="*config.json")
    began = time.monotonic()
    assert get(f"{files_hub.url}/x/files/resolve/main/config.json")[1] == b'{"a": 1}'
    assert time.monotonic() - began >= 0.2


def test_a_held_request_waits_for_its_gate_while_others_pass(files_hub):
    gate = files_hub.faults.hold_next(path="*config.json")
    url = f"{files_hub.url}/x/files/resolve/main/"
    bodies = []
    held = threading.Thread(target=lambda: bodies.append(get(url + "config.json")[1]))
    held.start()

    assert gate.wait_until_held()
    assert get(url + "empty.txt")[0] == 200
    assert bodies == []
    gate.open()
    held.join()
    assert bodies == [b'{"a": 1}']


def test_many_clients_at_once_get_their_own_bytes(files_hub):
    url = f"{files_hub.url}/x/files/resolve/main/weights.safetensors"
    wrong = []

    def read(i: int) -> None:
        start = i * 1000
        if get(url, Range=f"bytes={start}-{start + 999}")[1] != DATA[start : start + 1000]:
            wrong.append(i)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert files_hub.log.file_bytes() == 32_000


def test_a_closed_hub_refuses_connections(start_hub):
    hub = start_hub(HubContent())
    url = hub.url
    hub.close()
    with pytest.raises(urllib.error.URLError):
        get(f"{url}/api/models")


@pytest.mark.parametrize(
    "name", ["with space.txt", "naïve/→.txt", 'quo"te.bin', "per%cent#.txt", "plus+&=.bin"]
)
def test_any_file_name_arrives(start_hub, tmp_path, name):
    start_hub(content_of({name: b"bytes"}))
    path = huggingface_hub.snapshot_download("x/files", local_dir=tmp_path)
    assert (Path(path) / name).read_bytes() == b"bytes"


def test_a_hostile_revision_cannot_write_headers(files_hub):
    revision = quote("a\r\nX-Evil: →", safe="")
    status, _, headers = get(f"{files_hub.url}/x/files/resolve/{revision}/config.json")
    assert status == 404
    assert headers["X-Error-Code"] == "RevisionNotFound"
    assert "X-Evil" not in headers


def test_a_repository_that_cannot_be_built_says_why(start_hub, caplog):
    def build():
        raise FileNotFoundError("this Python lies here without its sources")

    content = HubContent()
    content.add("x/broken", build)
    start_hub(content)
    with pytest.raises(HfHubHTTPError, match="without its sources") as caught:
        HfApi().model_info("x/broken")
    assert caught.value.response.status_code == 500
    assert eventually(lambda: "without its sources" in caplog.text)


def test_a_client_that_goes_away_is_no_noise(start_hub, capfd):
    more_than_sockets_buffer = bytes(32 << 20)
    hub = start_hub(content_of({"large.bin": more_than_sockets_buffer}))
    get(f"{hub.url}/x/files/resolve/main/large.bin", Range="bytes=0-0")
    path = hub.log.entries()[-1].path
    address = urlsplit(hub.storage_url)
    with socket.create_connection((address.hostname, address.port)) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset, not close
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        client.recv(10)
    assert eventually(lambda: hub.log.entries()[-1].body_bytes < len(more_than_sockets_buffer))
    assert capfd.readouterr().err == ""


def test_no_answer_offers_xet(files_hub):
    for url in (
        f"{files_hub.url}/x/files/resolve/main/weights.safetensors",
        f"{files_hub.url}/api/models/x/files",
    ):
        assert not [name for name in get(url)[2] if "xet" in name.lower()]
