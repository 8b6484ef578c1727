"""The datasets that a configuration names: looked at, then built into blocks of the configured datastore."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Final

from metaflow_hf.config import DataConfig
from metaflow_hf.errors import ConfigError, UserError
from metaflow_hf.store import ObjectStore, configured_store

if TYPE_CHECKING:
    from metaflow_hf.data import BlockManager
    from metaflow_hf.data.mixture import MixedBlocks

# Samples a block of an evaluation dataset, of which only the first blocks are built.
EVALUATION_BLOCK: Final = 1_000


def format_settings(data: DataConfig) -> dict[str, Any]:
    """The settings that say which format the rows have, as ``BlockManager`` and ``plan_dataset`` take them."""
    return {"format": data.format, "columns": data.columns or None, "text_column": data.text_column}


def check_sources(data: DataConfig, store: ObjectStore | None = None) -> None:
    """Looks at training and evaluation dataset without downloading them: they exist, can be read, and have texts.

    ``store`` is where datasets may be built already, by default the configured datastore. Raises ``ConfigError`` for an
    unknown text column, for an evaluation dataset that is the one trained on, for two equal datasets of a mixture, and
    for a limit on samples of a dataset that is built already; ``SelectionError`` and the hub's errors.
    """
    from metaflow_hf.data.stored import find_stored

    store = configured_store() if store is None else store
    if data.datasets:
        _check_mixture(data, store)
        return
    if data.max_samples is not None and find_stored(str(data.dataset), store) is not None:
        raise ConfigError(
            f"data.max_samples: {data.dataset} is built already and trained as a whole. Leave it out, or name the "
            "source that the blocks were built from."
        )
    sources = list(filter(None, (data.dataset, data.evaluation_dataset)))
    if len({_identity(source, data, store) for source in sources}) < len(sources):
        raise ConfigError(
            f"data.evaluation_dataset: {data.evaluation_dataset} is what data.dataset trains on: nothing would be "
            "held out. Name another split (hf://name:config:split), or leave it out: then about "
            f"data.heldout_samples = {data.heldout_samples} rows are held out."
        )


def _identity(source: str, data: DataConfig, store: ObjectStore) -> tuple[str, str]:
    """Equal for sources of the same rows."""
    from metaflow_hf.data.build import plan_dataset
    from metaflow_hf.data.sources import open_source
    from metaflow_hf.data.stored import find_stored

    if (stored := find_stored(source, store)) is not None:
        return stored, ""
    spec = plan_dataset(
        open_source(source, documents=data.documents),
        samples_per_block=data.samples_per_block,
        keep_columns=data.keep_columns,
        **format_settings(data),
    )
    # Another commit of the same split is no other data.
    return spec.source, spec.source_digest


def _check_mixture(data: DataConfig, store: ObjectStore) -> None:
    known: dict[tuple[str, str], int] = {}
    for number, one in enumerate(data.datasets):
        with naming_dataset(data, number):
            same = known.setdefault(_identity(one.dataset, data.only(number), store), number)
        if same < number:
            raise ConfigError(
                f"data.datasets[{number}]: {one.dataset} is the same dataset as data.datasets[{same}], "
                f"{data.datasets[same].dataset}: train it more often by a larger epochs or weight."
            )
    source = data.evaluation_dataset
    if source is not None and (same := known.get(_identity(source, data, store), -1)) >= 0:
        raise ConfigError(
            f"data.evaluation_dataset: {source} is what data.datasets[{same}], {data.datasets[same].dataset}, trains on: "
            "nothing would be held out. Name another split (hf://name:config:split), or leave it out: then about "
            f"data.heldout_samples = {data.heldout_samples} rows are held out."
        )


@contextmanager
def naming_dataset(data: DataConfig, number: int) -> Iterator[None]:
    """Puts the place of a dataset in the configuration before the message of a ``UserError``."""
    try:
        yield
    except UserError as error:
        error.args = (f"data.datasets[{number}] ({data.datasets[number].title}): {error}",)
        raise


def build_parts(data: DataConfig) -> tuple[str, ...]:
    """The keys of the datasets of a mixture, each built as a dataset of its own; none without a mixture."""
    keys = []
    for number, one in enumerate(data.datasets):
        with naming_dataset(data, number):
            keys.append(build_source(one.dataset, data.only(number)))
    return tuple(keys)


def open_mixture(data: DataConfig, keys: Sequence[str], chunk_size: int) -> "MixedBlocks":
    """The built datasets of a mixture, to be read as one; ``keys`` are those of ``build_parts``."""
    from metaflow_hf.data import BlockManager
    from metaflow_hf.data.mixture import MixedBlocks, MixedPart

    with ExitStack() as stack:
        parts = []
        for number, (one, key) in enumerate(zip(data.datasets, keys, strict=True)):
            with naming_dataset(data, number):
                blocks = BlockManager(
                    configured_store().child(key),
                    data.samples_per_block,
                    chunk_size,
                    **format_settings(data.only(number)),
                )
            stack.callback(blocks.close)
            parts.append(MixedPart(name=one.title, blocks=blocks, max_samples=one.max_samples))
        mixture = MixedBlocks(parts)
        stack.pop_all()
    return mixture


def build_source(source: str, data: DataConfig, *, num_samples: int | None = None) -> str:
    """Builds (or finds) the blocks of a source in the datastore, and returns their key there.

    With ``num_samples`` only the blocks that hold so many; whoever asks for more goes on with the same dataset.
    """
    from metaflow_hf.data import BlockManager
    from metaflow_hf.data.stored import find_stored

    stored = find_stored(source, configured_store())
    if stored is not None:
        return stored
    some = num_samples is not None
    with BlockManager(
        source,
        min(data.samples_per_block, EVALUATION_BLOCK) if some else data.samples_per_block,
        **format_settings(data),
        on_bad_row=data.on_bad_row,
        max_rows=None if some else data.max_samples,
        documents=data.documents,
        keep_columns=data.keep_columns,
    ) as blocks:
        if num_samples is None:
            blocks.wait_complete()
        else:
            _wait_for(blocks, num_samples)
        return blocks.uri.removeprefix(f"{configured_store().uri}/")


def _wait_for(blocks: "BlockManager", num_samples: int) -> None:
    """Until so many samples are stored, or all there are."""
    known = blocks.manifest
    while known.total_samples < num_samples and not known.is_complete:
        try:
            blocks.get_block(known.total_blocks)
        except IndexError:
            blocks.wait_complete()
        known = blocks.manifest
