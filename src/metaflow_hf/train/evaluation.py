"""How well a model predicts held-out text: loss, perplexity and bits per byte, with exact counts."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from metaflow_hf.config import ModelConfig, TrainConfig
from metaflow_hf.data.batches import IGNORE_INDEX
from metaflow_hf.data.chat import as_text
from metaflow_hf.data.manager import BlockManager
from metaflow_hf.errors import ConfigError
from metaflow_hf.train.models import load_model, load_tokenizer
from metaflow_hf.train.spec import training_samples

WINDOWS_PER_BATCH: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """``loss`` in nats per predicted token, ``perplexity`` its exponential; ``bits_per_byte`` is the length of the
    texts, ends of documents included, when coded by the model, in bits per byte of UTF-8.

    ``tokens`` were predicted, ``bytes`` are those that they stand for.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int


def evaluate(
    model: nn.Module | Path | str,
    texts: Sequence[str],
    tokenizer: Any = None,
    *,
    sequence_length: int = 1024,
    device: torch.device | str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Evaluation:
    """Held-out quality of a model (or of one in a directory, which then may bring the tokenizer).

    The texts are joined by the end-of-text token, as in training, and cut into windows of ``sequence_length`` that
    do not overlap in what they predict: every token is predicted exactly once, from those before it in its window.
    Where the tokenizer has no such token, the very first token is context only, and its bytes do not count. A
    token that the tokenizer puts before each document is context, as in training, and not counted as predicted.
    Raises ``ConfigError`` when there is nothing to predict.
    """
    if isinstance(model, (str, Path)):
        settings = ModelConfig(allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
        tokenizer = tokenizer or load_tokenizer(Path(model), trust_remote_code=trust_remote_code)
        model = load_model(Path(model), settings)
        model.to(torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    if tokenizer is None:
        raise ConfigError("evaluate needs the tokenizer of a model that is given as an object.")
    stream, num_bytes = _stream(texts, tokenizer)
    if len(stream) < 2 or num_bytes == 0:
        raise ConfigError(f"there is nothing to predict in the {len(texts)} texts given.")
    begin = _beginning(tokenizer, stream)
    place = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            total = sum(
                _loss_sum(model, window.to(place), begin) for window in _windows(stream, sequence_length)
            )
    finally:
        model.train(was_training)
    tokens = sum(token != begin for token in stream[1:])
    loss = total / tokens
    return Evaluation(
        loss=loss,
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        bits_per_byte=total / math.log(2) / num_bytes,
        tokens=tokens,
        bytes=num_bytes,
    )


def heldout_texts(blocks: BlockManager, config: TrainConfig, tokenizer: Any = None) -> list[str]:
    """Texts that no worker trains: those at the end of the dataset that the configuration holds out.

    At most ``evaluation.max_samples``; conversations are rendered by the template of ``tokenizer``. Raises ``ConfigError`` when an ``evaluation_dataset`` is configured, whose
    rows are to be used instead.
    """
    if config.data.evaluation_dataset is not None:
        raise ConfigError("data.evaluation_dataset is configured: its texts are the held-out ones.")
    manifest = blocks.wait_complete()
    sizes = [block.sample_count for block in manifest.blocks]
    trained = training_samples(sizes, config)
    wanted = min(config.evaluation.max_samples, config.data.heldout_samples)
    column = config.data.text_column or blocks.text_column
    texts: list[str] = []
    for block_id, (start, size) in enumerate(zip(trained, sizes, strict=True)):
        stop = min(size, start + wanted - len(texts))
        rows = blocks.read_rows(block_id, start, stop)
        texts += [as_text(row.get(column), tokenizer, row=start + n) for n, row in enumerate(rows)]
        if len(texts) >= wanted:
            break
    return texts


def _stream(texts: Sequence[str], tokenizer: Any) -> tuple[list[int], int]:
    """All tokens in a row, and how many bytes those after the first stand for."""
    used = [text for text in texts if text]
    num_bytes = sum(len(text.encode()) for text in used)
    ids = tokenizer(used, verbose=False)["input_ids"] if used else []
    end = tokenizer.eos_token_id
    if ids and _beginning(tokenizer, ids[0]) is not None:
        ends = () if end is None else (end,)
        return [token for document in ids for token in (*document, *ends)], num_bytes
    if end is None:
        stream = [token for document in ids for token in document]
        return stream, num_bytes - (len(tokenizer.decode(stream[:1]).encode()) if stream else 0)
    return [end, *(token for document in ids for token in (*document, end))], num_bytes


def _beginning(tokenizer: Any, document: Sequence[int]) -> int | None:
    """The token that this tokenizer puts before each document, if it is told from the one at the end."""
    begin = tokenizer.bos_token_id
    starts = begin is not None and begin != tokenizer.eos_token_id and document[:1] == [begin]
    return int(begin) if starts else None


def _windows(stream: Sequence[int], length: int) -> Iterator[Tensor]:
    """Batches [B, length + 1]: inputs and, one later, targets; the last window is as long as what is left."""
    full = (len(stream) - 1) // length
    starts = [number * length for number in range(full)]
    for first in range(0, full, WINDOWS_PER_BATCH):
        rows = [stream[start : start + length + 1] for start in starts[first : first + WINDOWS_PER_BATCH]]
        yield torch.tensor(rows)
    if full * length < len(stream) - 1:
        yield torch.tensor([stream[full * length :]])


def _loss_sum(model: nn.Module, window: Tensor, begin: int | None) -> float:
    logits = model(input_ids=window[:, :-1], use_cache=False).logits
    targets = window[:, 1:].flatten()
    if begin is not None:
        targets = targets.masked_fill(targets == begin, IGNORE_INDEX)
    losses = nn.functional.cross_entropy(logits.float().flatten(0, 1), targets, reduction="sum")
    return float(losses.double())
