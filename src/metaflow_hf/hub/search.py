"""Datasets of the hub by modality, and what can be done with each."""

from dataclasses import asdict, dataclass
from typing import Any, Final

from metaflow_hf.errors import SelectionError
from metaflow_hf.hub.endpoint import Endpoint

FULL: Final = "full"
TEXT_EXTRACTION: Final = "text extraction needed"
BROWSE: Final = "browse and download only"
# The hub's filter tags are modality:<name>.
MODALITIES: Final[dict[str, str]] = {
    "text": FULL,
    "document": TEXT_EXTRACTION,
    **dict.fromkeys(("3d", "audio", "geospatial", "image", "tabular", "timeseries", "video"), BROWSE),
}
DEFAULT_LIMIT: Final = 20


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
    sort: str = "downloads",
    limit: int | None = DEFAULT_LIMIT,
    endpoint: str | None = None,
    token: bool | str | None = None,
) -> list[FoundDataset]:
    """The hub's datasets whose name has the words of ``query``, of one ``modality`` (``MODALITIES``), best first.

    Pages are followed until ``limit`` (``None``: all). Raises ``SelectionError`` for an unknown modality or an order
    that the hub does not know, ``HubUnavailable`` when it does not answer.
    """
    if modality is not None and modality not in MODALITIES:
        raise SelectionError(f"modality {modality!r} is none of {', '.join(MODALITIES)}.")
    orders = ("downloads", "likes", "last_modified", "created_at", "trending_score")
    if sort not in orders:
        raise SelectionError(f"sort={sort!r} is none of {', '.join(orders)}.")
    from huggingface_hub import HfApi

    from metaflow_hf.hub.client import HubClient

    client = HubClient(Endpoint.of(endpoint), token=token)
    api = HfApi(endpoint=client.endpoint.url, token=token, library_name="metaflow-hf")

    def ask() -> list[FoundDataset]:
        found = api.list_datasets(
            search=query,
            filter=None if modality is None else f"modality:{modality}",
            author=author,
            sort=sort,  # type: ignore[arg-type]  # checked above
            limit=limit,
        )
        return [_found(info) for info in found]

    return client.repeat(f"the search for datasets {query or ''}".rstrip(), ask)


def _found(info: Any) -> FoundDataset:
    tags = [tag.removeprefix("modality:") for tag in info.tags or () if tag.startswith("modality:")]
    return FoundDataset(
        repo_id=info.id,
        modalities=tuple(sorted(tags)),
        training=_training(tags),
        downloads=info.downloads or 0,
        likes=info.likes or 0,
        private=bool(info.private),
        gated=bool(info.gated),
        last_modified="" if info.last_modified is None else info.last_modified.isoformat(),
    )


def _training(modalities: list[str]) -> str:
    supports = {MODALITIES.get(modality, BROWSE) for modality in modalities}
    return next((support for support in (FULL, TEXT_EXTRACTION) if support in supports), BROWSE)
