"""The first rows of a dataset, encoded before anything else is done: bad settings show in them."""

from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, Final

import msgspec

from metaflow_hf.config import DataConfig, TrainConfig
from metaflow_hf.errors import ConfigError
from metaflow_hf.store import configured_store
from metaflow_hf.train.blocks import naming_dataset

CHECKED_ROWS: Final = 50


Rows = Sequence[Mapping[str, Any]]


def read_first_rows(data: DataConfig) -> list[Rows]:
    """Some rows of the dataset, or of each dataset of a mixture. Raises the errors of the source."""
    found: list[Rows] = []
    for number, one in enumerate(_parts(data)):
        with naming_dataset(data, number) if data.datasets else nullcontext():
            found.append(_first_rows(one))
    return found


def _parts(data: DataConfig) -> list[DataConfig]:
    return [data.only(number) for number in range(len(data.datasets))] or [data]


def _first_rows(data: DataConfig) -> Rows:
    from metaflow_hf.data import BlockManager
    from metaflow_hf.data.manifest import Cursor
    from metaflow_hf.data.sources import open_source
    from metaflow_hf.data.stored import find_stored

    location = str(data.dataset)
    if (key := find_stored(location, configured_store())) is not None:
        with BlockManager(configured_store().child(key), enable_prefetch=False) as blocks:
            size = blocks.manifest.blocks[0].sample_count if blocks.manifest.blocks else 0
            return blocks.read_rows(0, 0, min(size, CHECKED_ROWS)) if size else []
    rows: list[Mapping[str, Any]] = []
    with closing(open_source(location, documents=data.documents).batches(Cursor())) as batches:
        for batch in batches:
            rows += filter(None, map(_as_row, islice(batch.rows, CHECKED_ROWS - len(rows))))
            if len(rows) >= CHECKED_ROWS:
                break
    return rows


def check_rows(model_dir: Path, config: TrainConfig, rows: Sequence[Rows]) -> None:
    """Encodes what ``read_first_rows`` found with the model's tokenizer, as a worker would.

    Raises ``FormatError`` when a format is not certain, ``BadRowError`` for a row that cannot be used (unless bad rows
    are to be skipped), and ``ConfigError`` when none of them has a token with loss left.
    """
    from metaflow_hf.train.encoding import training_tokenizer

    tokenizer = training_tokenizer(model_dir, config)
    for number, (one, some) in enumerate(zip(_parts(config.data), rows, strict=True)):
        with naming_dataset(config.data, number) if config.data.datasets else nullcontext():
            _check(tokenizer, config, one, some)


def _check(tokenizer: Any, config: TrainConfig, data: DataConfig, rows: Rows) -> None:
    from metaflow_hf.data.batches import make_batches
    from metaflow_hf.data.formats import resolve_format
    from metaflow_hf.train.encoding import example_encoder

    if not rows:
        return
    location = str(data.dataset)
    form = resolve_format(
        rows, format=data.format, columns=data.columns or None, text_column=data.text_column, where=location
    )
    encoder = example_encoder(tokenizer, form, config)
    examples = encoder.encode(rows, name_row=lambda number: f"{location}, row {number}")
    policy = "split" if config.rollout.use_chunked_training is True else data.long_documents
    batches = make_batches(examples, sequence_length=data.sequence_length, long_documents=policy)
    if examples and not any(batch.num_tokens for batch in batches):
        raise no_token_left(config, f"the first {len(rows)} rows of {location}")


def no_token_left(config: TrainConfig, rows: str) -> ConfigError:
    """The error for rows of which nothing is learned."""
    data = config.data
    if data.long_documents == "split":
        return ConfigError(
            f"no token of {rows} carries loss (data.loss_on: {data.loss_on}): set data.format and data.columns, or "
            "data.loss_on: all."
        )
    return ConfigError(
        f"no token with loss is left of {rows} after data.long_documents: {data.long_documents} at data.sequence_length: "
        f"{data.sequence_length}: the prompts are longer than that. Raise data.sequence_length, or set "
        "data.long_documents: split."
    )


def _as_row(row: Any) -> dict[str, Any] | None:
    """A row as a dict; ``None`` for one that is refused by its number when its turn comes."""
    if isinstance(row, Mapping):
        return dict(row)
    try:
        return msgspec.json.decode(row, type=dict[str, Any])
    except (TypeError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
