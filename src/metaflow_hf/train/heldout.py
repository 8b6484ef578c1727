"""Which texts are held out, so that no worker trains them: by place, and by content where they occur again."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from metaflow_hf.config import TrainConfig
from metaflow_hf.data.chat import Conversation
from metaflow_hf.data.manager import BlockManager
from metaflow_hf.errors import ConfigError
from metaflow_hf.train.spec import training_samples

Value = str | Conversation


def value_of(row: Mapping[str, Any], column: str) -> Value | None:
    """The text or the conversation in a row, as it is before any tokenizer; ``None`` for a row without."""
    value = row.get(column)
    if isinstance(value, list):
        return Conversation.of_row(value, row) if value else None
    return str(value) if value else None


def key_of(value: Value) -> bytes:
    """Equal for equal contents."""
    content = value if isinstance(value, str) else [value.messages, value.tools]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()


def heldout_texts(blocks: BlockManager, config: TrainConfig) -> list[Value]:
    """Texts and conversations that no worker trains: those at the end of the dataset that are held out.

    At most ``evaluation.max_samples``, without those that occur there more than once: what every other row says is
    trained, and measures nothing. Raises ``ConfigError`` when all do, and when an ``evaluation_dataset`` is
    configured, whose rows are to be used instead.
    """
    if config.data.evaluation_dataset is not None:
        raise ConfigError("data.evaluation_dataset is configured: its texts are the held-out ones.")
    values = _measured(blocks, config)
    if not values:
        raise ConfigError(
            f"the last {config.data.heldout_samples} rows (data.heldout_samples) have no text that occurs only once among "
            "them: nothing can be measured. Name a data.evaluation_dataset."
        )
    return list(values.values())[: config.evaluation.max_samples]


def heldout_keys(blocks: BlockManager, config: TrainConfig) -> frozenset[bytes]:
    """The keys of all texts that are held out at the end of the dataset, whose copies elsewhere are not trained."""
    if config.data.evaluation_dataset is not None:
        return frozenset()
    return frozenset(_measured(blocks, config))


def first_texts(blocks: BlockManager, wanted: int) -> list[Value]:
    """The first ``wanted`` rows of an evaluation dataset, without those that have no text."""
    values: list[Value] = []
    for block in blocks.manifest.blocks:
        rows = blocks.read_rows(block.block_id, 0, min(block.sample_count, wanted))
        wanted -= len(rows)
        values += [value for row in rows if (value := value_of(row, blocks.text_column)) is not None]
    return values


def _measured(blocks: BlockManager, config: TrainConfig) -> dict[bytes, Value]:
    keyed = [(key_of(value), value) for value in _held_out(blocks, config)]
    times = Counter(key for key, _ in keyed)
    return {key: value for key, value in keyed if times[key] == 1}


def _held_out(blocks: BlockManager, config: TrainConfig) -> Iterator[Value]:
    sizes = [block.sample_count for block in blocks.wait_complete().blocks]
    column = config.data.text_column or blocks.text_column
    wanted = config.data.heldout_samples
    for block_id, (start, size) in enumerate(zip(training_samples(sizes, config), sizes, strict=True)):
        rows = blocks.read_rows(block_id, start, min(size, start + wanted))
        wanted -= len(rows)
        yield from (value for row in rows if (value := value_of(row, column)) is not None)
