"""The datasets that a configuration names: looked at, then built into blocks of the configured datastore."""

from typing import TYPE_CHECKING, Any, Final

from metaflow_hf.config import DataConfig
from metaflow_hf.errors import ConfigError
from metaflow_hf.store import configured_store

if TYPE_CHECKING:
    from metaflow_hf.data import BlockManager

# Samples a block of an evaluation dataset, of which only the first blocks are built.
EVALUATION_BLOCK: Final = 1_000


def format_settings(data: DataConfig) -> dict[str, Any]:
    """The settings that say which format the rows have, as ``BlockManager`` and ``plan_dataset`` take them."""
    return {"format": data.format, "columns": data.columns or None, "text_column": data.text_column}


def check_sources(data: DataConfig) -> None:
    """Looks at training and evaluation dataset without downloading them: they exist, can be read, and have texts.

    Raises ``ConfigError`` for an unknown text column, for an evaluation dataset that is the one trained on, and for a
    limit on samples of a dataset that is built already; ``SelectionError`` and the hub's errors.
    """
    from metaflow_hf.data.build import plan_dataset
    from metaflow_hf.data.sources import open_source
    from metaflow_hf.data.stored import find_stored

    def identity(source: str) -> tuple[str, str]:
        if (stored := find_stored(source, configured_store())) is not None:
            return stored, ""
        spec = plan_dataset(
            open_source(source, documents=data.documents),
            samples_per_block=data.samples_per_block,
            keep_columns=data.keep_columns,
            **format_settings(data),
        )
        # Another commit of the same split is no other data.
        return spec.source, spec.source_digest

    if data.max_samples is not None and find_stored(str(data.dataset), configured_store()) is not None:
        raise ConfigError(
            f"data.max_samples: {data.dataset} is built already and trained as a whole. Leave it out, or name the "
            "source that the blocks were built from."
        )
    sources = list(filter(None, (data.dataset, data.evaluation_dataset)))
    if len({identity(source) for source in sources}) < len(sources):
        raise ConfigError(
            f"data.evaluation_dataset: {data.evaluation_dataset} is what data.dataset trains on: nothing would be "
            "held out. Name another split (hf://name:config:split), or leave it out: then about "
            f"data.heldout_samples = {data.heldout_samples} rows are held out."
        )


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
