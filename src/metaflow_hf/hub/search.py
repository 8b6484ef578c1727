"""Datasets of the hub by modality, and what can be done with each."""

from dataclasses import asdict, dataclass
from typing import Any, Final

from metaflow_hf.errors import SelectionError
from metaflow_hf.hub.endpoint import Endpoint
from metaflow_hf.hub.modalities import MODALITIES, modalities_of, training_support

DEFAULT_LIMIT: Final = 20
# What people type without quotes in a shell -> the hub's tag.
SIZES: Final[dict[str, str]] = {
    "1K": "n<1K",
    "1K-10K": "1K<n<10K",
    "10K-100K": "10K<n<100K",
    "100K-1M": "100K<n<1M",
    "1M-10M": "1M<n<10M",
    "10M-100M": "10M<n<100M",
    "100M-1B": "100M<n<1B",
    "1B-10B": "1B<n<10B",
    "10B-100B": "10B<n<100B",
    "100B-1T": "100B<n<1T",
    "1T": "n>1T",
}


@dataclass(frozen=True, slots=True)
class FoundDataset:
    """One dataset as the hub's search shows it; ``training`` says what training can do with it."""

    repo_id: str
    modalities: tuple[str, ...]
    training: str
    downloads: int
    likes: int
    private: bool
    gated: bool
    last_modified: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def search_datasets(
    query: str | None = None,
    *,
    modality: str | None = None,
    author: str | None = None,
    language: str | None = None,
    size: str | None = None,
    sort: str = "downloads",
    limit: int | None = DEFAULT_LIMIT,
    endpoint: str | None = None,
    token: bool | str | None = None,
) -> list[FoundDataset]:
    """The hub's datasets whose name has the words of ``query``, of one ``modality`` (``MODALITIES``), best first.

    ``language`` is a code such as ``en``, ``size`` a range of rows of ``SIZES`` such as ``1M-10M``. Pages are followed
    until ``limit`` (``None``: all). Raises ``SelectionError`` for an unknown modality, size or order,
    ``HubUnavailable`` when the hub does not answer.
    """
    if modality is not None and modality not in MODALITIES:
        raise SelectionError(f"modality {modality!r} is none of {', '.join(MODALITIES)}.")
    if size is not None and size not in SIZES:
        raise SelectionError(f"size {size!r} is none of {', '.join(SIZES)} (rows).")
    orders = ("downloads", "likes", "last_modified", "created_at", "trending_score")
    if sort not in orders:
        raise SelectionError(f"sort={sort!r} is none of {', '.join(orders)}.")
    from huggingface_hub import HfApi

    from metaflow_hf.hub.client import HubClient

    tags = [f"modality:{modality}"] if modality else []
    tags += [f"language:{language}"] if language else []
    tags += [f"size_categories:{SIZES[size]}"] if size else []
    client = HubClient(Endpoint.of(endpoint), token=token)
    api = HfApi(endpoint=client.endpoint.url, token=token, library_name="metaflow-hf")

    def ask() -> list[FoundDataset]:
        found = api.list_datasets(
            search=query,
            filter=tags,
            author=author,
            sort=sort,  # type: ignore[arg-type]  # checked above
            limit=limit,
        )
        return [_found(info) for info in found]

    return client.repeat(f"the search for datasets {query or ''}".rstrip(), ask)


def _found(info: Any) -> FoundDataset:
    modalities = modalities_of(info.tags or ())
    return FoundDataset(
        repo_id=info.id,
        modalities=modalities,
        training=training_support(modalities),
        downloads=info.downloads or 0,
        likes=info.likes or 0,
        private=bool(info.private),
        gated=bool(info.gated),
        last_modified="" if info.last_modified is None else info.last_modified.isoformat(),
    )
