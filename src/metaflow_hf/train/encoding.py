"""The tokenizer of a training, and what turns the rows of a dataset into the tokens that it trains."""

import datetime as dt
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from metaflow_hf.config import TrainConfig
from metaflow_hf.data.chat import ChatTemplate, read_chat_template
from metaflow_hf.data.formats import DetectedFormat
from metaflow_hf.data.mixture import MixedBlocks, ReadableBlocks
from metaflow_hf.data.tokens import ExampleEncoder
from metaflow_hf.train.models import load_tokenizer
from metaflow_hf.train.records import Spec

SAMPLED_BLOCKS: Final = 4
SAMPLED_ROWS: Final = 200


def training_tokenizer(model_dir: Path, config: TrainConfig) -> Any:
    """The tokenizer of a model, with ``data.chat_template`` where that is set.

    Raises ``ConfigError`` for a template that does not exist, and ``UnsupportedModelError`` without a tokenizer.
    """
    tokenizer = load_tokenizer(model_dir, trust_remote_code=config.model.trust_remote_code)
    if config.data.chat_template is not None:
        tokenizer.chat_template = read_chat_template(config.data.chat_template, tokenizer)
    return tokenizer


def trained_end_tokens(tokenizer: Any, spec: Spec) -> list[int]:
    """What ends a document in what a lineage trained, and a turn, where it trained conversations: where to stop."""
    ends = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    template, is_text = ChatTemplate(tokenizer), "format" not in spec.hyperparameters.get("data", {})
    if template and not is_text and (end := template.end_token_id) is not None:
        ends.append(end)
    return list(dict.fromkeys(ends))


def with_template_date(config: TrainConfig, model_dir: Path, spec: Spec | None) -> TrainConfig:
    """``config`` with the date that a lineage's chat template prints: the lineage's own, today's for a new one.

    A configured date stays, and where no template asks for a date there is none.
    """
    if config.data.template_date is not None:
        return config
    if spec is not None:
        date = spec.hyperparameters.get("data", {}).get("template_date")
    else:
        template = getattr(training_tokenizer(model_dir, config), "chat_template", None)
        date = dt.datetime.now(dt.UTC).date().isoformat() if "strftime_now" in str(template) else None
    return config.replace(data={"template_date": date}) if date else config


def row_format(blocks: ReadableBlocks, config: TrainConfig) -> DetectedFormat:
    """The format of a dataset's rows: what the configuration says, else what the dataset was built with."""
    data = config.data
    return blocks.format_as(format=data.format, columns=data.columns, text_column=data.text_column)


def example_encoder(tokenizer: Any, form: DetectedFormat, config: TrainConfig) -> ExampleEncoder:
    """What turns rows of this format into tokens, by the rules of the configuration."""
    data = config.data
    return ExampleEncoder(
        tokenizer, form, loss_on=data.loss_on, on_bad_row=data.on_bad_row, template_date=template_date(config)
    )


def template_date(config: TrainConfig) -> dt.date | None:
    """The date that chat templates print which ask for the current one; ``None`` for the day on which they are used."""
    date = config.data.template_date
    return None if date is None else dt.date.fromisoformat(date)


def rows_of_step(blocks: ReadableBlocks, encoder: ExampleEncoder, config: TrainConfig) -> int:
    """About how many rows fill an optimizer step, judged by some from the beginning of each of the first blocks.

    Of a mixture the dataset with the shortest rows decides: a claim holds rows of one dataset.
    """
    if isinstance(blocks, MixedBlocks):
        return max(
            _rows_of_step(blocks, blocks.blocks_of(part), encoder, config)
            for part in range(len(blocks.parts))
        )
    return _rows_of_step(blocks, range(blocks.manifest.total_blocks), encoder, config)


def _rows_of_step(
    blocks: ReadableBlocks, block_ids: Sequence[int], encoder: ExampleEncoder, config: TrainConfig
) -> int:
    data = config.data
    sequences = data.batch_size * config.optimizer.gradient_accumulation_steps
    found = (blocks.manifest.blocks[block_id] for block_id in block_ids)
    blocks_read = [block for block in found if block.sample_count][:SAMPLED_BLOCKS]
    rows = [
        row
        for block in blocks_read
        for row in blocks.read_rows(
            block.block_id, 0, min(block.sample_count, SAMPLED_ROWS // len(blocks_read))
        )
    ]
    tokens = sum(len(example.input_ids) for example in encoder.encode(rows))
    if not data.packing or not tokens:
        return sequences
    return max(round(sequences * data.sequence_length * len(rows) / tokens), 1)
