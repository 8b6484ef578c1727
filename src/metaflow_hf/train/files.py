"""Local copies of a lineage's tensor files: each fetched once, verified, and dropped when its round is over."""

from collections.abc import Iterable
from pathlib import Path

from metaflow_hf.store.objects import Digest, ObjectStore
from metaflow_hf.train.records import Payload


class PayloadFiles:
    """Files by digest in one directory of this process; read only, for a store may know them by another name."""

    def __init__(self, store: ObjectStore, directory: Path) -> None:
        self._store = store
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def fetch(self, payload: Payload) -> Path:
        """The local file of a payload. Raises ``NotFound``, ``IntegrityError`` for other bytes than recorded."""
        path = self.path(payload.digest)
        if not path.exists():
            self._store.download(payload.key, path, expected=payload.expected, shared=True)
        return path

    def path(self, digest: str) -> Path:
        """Where a file of this digest lies, or would."""
        return self._directory / f"{digest}.safetensors"

    def draft(self, name: str) -> Path:
        """A place for a file whose digest is not known yet; ``adopt`` it when it is complete."""
        return self._directory / f"{name}.draft"

    def adopt(self, draft: Path, digest: Digest) -> Path:
        """Gives a complete draft the name of its digest."""
        return draft.replace(self.path(digest.sha256))

    def keep_only(self, payloads: Iterable[Payload | None]) -> None:
        """Deletes every other file."""
        kept = {self.path(payload.digest) for payload in payloads if payload is not None}
        for path in self._directory.iterdir():
            if path not in kept:
                path.unlink(missing_ok=True)
