"""Brings one file of the hub to this node, and goes on where a killed or broken download stopped.

huggingface_hub's own ``hf_hub_download`` begins a file anew in each process, and its ``http_get`` sleeps for as long
as a server tells it to; so plain HTTP is streamed here. Files on Xet storage go through ``hf_hub_download``.
"""

import hashlib
import importlib.util
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    get_session,
    hf_raise_for_status,
    tqdm,
)

from metaflow_hf import environment
from metaflow_hf.errors import HubUnavailable, IntegrityError, StoreUnavailable
from metaflow_hf.hub.client import HubClient, RemoteFile
from metaflow_hf.hub.names import Repo
from metaflow_hf.hub.pace import Pace
from metaflow_hf.hub.tally import FileTally
from metaflow_hf.store.objects import Digest

logger = logging.getLogger("metaflow_hf.hub")

# How many bytes arrive before that is told, and the transfer can be stopped, again.
TOLD_BYTES: Final = 1 << 18


def silent_bar(progress: FileTally) -> type[tqdm]:
    """A class of huggingface_hub's bars that draws nothing and passes on what one file's bar is told."""

    class SilentBar(tqdm):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]
            self.size = 0

        def update(self, n: float | None = 1) -> None:
            self.size += int(n or 0)
            progress.noted(self.size)

        # What Xet reports besides: bytes of its own chunks, on their way to becoming bytes of the file.
        def update_transfer(self, n: float) -> None:
            pass

        def set_transfer_postfix_str(self, *args: object, **kwargs: object) -> None:
            pass

    return SilentBar


def bring_file(
    client: HubClient,
    repo: Repo,
    commit_hash: str,
    file: RemoteFile,
    place: Path,
    *,
    progress: FileTally,
    use_hub_cache: bool = True,
) -> None:
    """Completes the file at ``place``, going on after what an earlier process left there.

    Only its size is right for sure: ``check_file`` and the store compare the bytes. With ``use_hub_cache`` it
    is taken from the user's huggingface_hub cache where that has it. Raises ``IntegrityError`` when the hub sends another size,
    ``HubUnavailable`` when it gives up in the middle, ``StoreUnavailable`` when the disk is full.
    """
    what = f"{file.path!r} of {repo} at {commit_hash[:12]}"
    try:
        if _size(place) > file.size:
            place.unlink()
        if use_hub_cache and (_size(place) < file.size or not place.exists()):
            _copy_from_hub_cache(repo, file, place)
        progress.found(_size(place))
        if place.exists() and _size(place) == file.size:
            logger.debug("%s is on this node already", what)
        elif file.is_xet and _can_use_xet():
            client.repeat(what, lambda: _get_by_xet(client, repo, commit_hash, file, place, progress))
        else:
            url = client.file_url(repo, commit_hash, file.path)
            _repeat_while_it_grows(
                place,
                client.pace,
                lambda: client.repeat(what, lambda: _get_by_http(client, url, file, place, progress)),
            )
    except OSError as error:
        if error.errno is None or isinstance(error, ConnectionError):
            raise
        raise StoreUnavailable(
            f"{what} cannot be written to {place.parent}: {error.strerror}. Make room there, or set METAFLOW_HF_CACHE to "
            "a larger disk."
        ) from error
    progress.arrived(file.size)


def check_file(place: Path, file: RemoteFile) -> Digest:
    """The digest that the file must have, for whoever reads all its bytes next.

    An LFS file's sha256 is known from the hub's tree; a small file is read and compared with git's sha1 here.
    Raises ``IntegrityError``.
    """
    if file.sha256 is not None:
        return Digest(sha256=file.sha256, size=file.size)
    data = place.read_bytes()
    sha1 = hashlib.sha1(f"blob {len(data)}\0".encode() + data, usedforsecurity=False).hexdigest()
    if sha1 != file.oid:
        raise IntegrityError(f"{file.path!r} has git sha1 {sha1} instead of {file.oid}.")
    return Digest(sha256=hashlib.sha256(data).hexdigest(), size=len(data))


def _size(place: Path) -> int:
    return place.stat().st_size if place.exists() else 0


def _repeat_while_it_grows(place: Path, pace: Pace, request: Callable[[], None]) -> None:
    """The bounds on retries count anew whenever bytes arrived: a long download outlives many short outages, but no
    body that trickles.
    """
    while True:
        before, began = _size(place), time.monotonic()
        try:
            request()
        except HubUnavailable:
            if pace.is_too_slow(_size(place) - before, time.monotonic() - began):
                raise
        else:
            return


def _get_by_http(client: HubClient, url: str, file: RemoteFile, place: Path, progress: FileTally) -> None:
    progress.trying()
    # Compressed on the way, a file could not be continued.
    headers = {**client.request_headers(), "Accept-Encoding": "identity"}
    with place.open("ab") as out:
        size = told = out.tell()
        if size:
            headers["Range"] = f"bytes={size}-"
        with get_session().stream(
            "GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT, follow_redirects=True
        ) as response:
            if response.status_code == 416:
                out.truncate(0)
                raise IntegrityError(f"{file.path!r} has fewer bytes there than the {size} that came before.")
            hf_raise_for_status(response)
            if size and response.status_code != 206:
                # A proxy that knows no ranges sends the whole file.
                out.truncate(0)
                size = told = 0
            # As they come: put together to larger chunks, the bytes would be copied twice more.
            for chunk in client.pace.checked(response.iter_bytes()):
                size += len(chunk)
                if size > file.size:
                    # Whatever this is, it must not fill the disk.
                    out.truncate(0)
                    raise IntegrityError(f"{file.path!r} comes with more than its {file.size} bytes.")
                out.write(chunk)
                if size - told >= TOLD_BYTES:
                    told = size
                    progress.arrived(size)
    if size != file.size:
        raise IntegrityError(f"{file.path!r} came with {size} bytes instead of {file.size}.")


def _copy_from_hub_cache(repo: Repo, file: RemoteFile, place: Path) -> None:
    cached = environment.hub_cache() / repo.key / "blobs" / (file.sha256 or file.oid)
    try:
        if cached.stat().st_size == file.size:
            shutil.copyfile(cached, place)
    except OSError as error:
        logger.debug("%s is not taken from huggingface_hub's cache: %s", file.path, error)


def _can_use_xet() -> bool:
    return importlib.util.find_spec("hf_xet") is not None and not constants.HF_HUB_DISABLE_XET


def _get_by_xet(
    client: HubClient, repo: Repo, commit_hash: str, file: RemoteFile, place: Path, progress: FileTally
) -> None:
    progress.trying()
    folder = place.with_name(f"{place.name}.xet")
    found = hf_hub_download(
        repo.repo_id,
        file.path,
        repo_type=repo.repo_type,
        revision=commit_hash,
        local_dir=folder,
        endpoint=client.endpoint.url,
        token=client.token,
        headers=client.headers,
        tqdm_class=silent_bar(progress),
    )
    Path(found).replace(place)
    shutil.rmtree(folder)
