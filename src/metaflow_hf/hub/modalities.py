"""What kind of data a dataset of the hub holds, and what training can do with it."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from metaflow_hf.errors import UnsupportedModalityError

if TYPE_CHECKING:
    from metaflow_hf.hub.client import HubClient
    from metaflow_hf.hub.names import Repo

FULL: Final = "full"
TEXT_EXTRACTION: Final = "text extraction needed"
BROWSE: Final = "browse and download only"
# The hub's filter tags are modality:<name>.
MODALITIES: Final[dict[str, str]] = {
    "text": FULL,
    "document": TEXT_EXTRACTION,
    **dict.fromkeys(("3d", "audio", "geospatial", "image", "tabular", "timeseries", "video"), BROWSE),
}
_PREFIX: Final = "modality:"


def modalities_of(tags: Iterable[str]) -> tuple[str, ...]:
    """The modalities among a dataset's tags, sorted; none where the hub does not know."""
    return tuple(sorted(tag.removeprefix(_PREFIX) for tag in tags if tag.startswith(_PREFIX)))


def training_support(modalities: Iterable[str]) -> str:
    """What training can do with a dataset of these modalities: text among others is enough."""
    supports = {MODALITIES.get(modality, BROWSE) for modality in modalities}
    return next((support for support in (FULL, TEXT_EXTRACTION) if support in supports), BROWSE)


def check_modalities(client: "HubClient", repo: "Repo", commit_hash: str, *, has_documents: bool) -> None:
    """Returns if texts can be made of a dataset, as far as its tags tell; nothing of it is downloaded.

    ``has_documents`` says that it consists of documents whose text can be extracted. Raises
    ``UnsupportedModalityError`` that names the modalities and what is possible with them.
    """
    modalities = modalities_of(client.tags(repo, commit_hash))
    support = training_support(modalities)
    if not modalities or support == FULL or (has_documents and support == TEXT_EXTRACTION):
        return
    possible = (
        "its texts have to be extracted first, which is done for repositories of .pdf, .docx, .html and .md files"
        if support == TEXT_EXTRACTION
        else "it can be browsed and downloaded, but only text can be trained on"
    )
    raise UnsupportedModalityError(
        f"{repo} holds {', '.join(modalities)} data: {possible}. Download it with "
        f"`metaflow hf datasets download {repo.repo_id}`; find text with `metaflow hf datasets search --modality text`."
    )
