"""How well a model predicts held-out text: loss, perplexity and bits per byte, with exact counts."""

import logging
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from metaflow_hf.config import ModelConfig
from metaflow_hf.data.chat import Conversation, Transcript, transcribe
from metaflow_hf.data.tokens import IGNORE_INDEX, Document, LossOn, encode, end_document
from metaflow_hf.errors import ConfigError, UnsupportedModelError
from metaflow_hf.train.models import load_model, load_tokenizer

logger = logging.getLogger("metaflow_hf.train")

WINDOWS_PER_BATCH: Final = 8
# Logits of one pass, in fp32.
LOGITS_BYTES: Final = 256 * 2**20
_FEW_TOKENS: Final = 8


@dataclass(frozen=True, slots=True)
class DocumentLoss:
    """How well one text was predicted: its number among those given, mean loss in nats, and predicted tokens."""

    index: int
    loss: float
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """``loss`` in nats per predicted token, ``perplexity`` its exponential; ``bits_per_byte`` is the length of the
    texts, ends of documents included, when coded by the model, in bits per byte of UTF-8.

    ``tokens`` were predicted, ``bytes`` are those that they stand for. ``documents`` are the texts with a predicted
    token, each by itself, in the order given.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int
    documents: tuple[DocumentLoss, ...] = ()

    def worst(self, number: int) -> list[DocumentLoss]:
        """The texts that were predicted worst, worst first; very short ones, whose loss says little, come last."""
        ranked = sorted(self.documents, key=lambda one: (one.tokens < _FEW_TOKENS, -one.loss))
        return ranked[:number]


@dataclass(frozen=True, slots=True)
class Passage:
    """A held-out text as it is measured: its tokens, those to be predicted with labels, what these stand for, and its
    number among the texts given.
    """

    document: Document
    text: str
    index: int = 0

    @property
    def predicted(self) -> list[int]:
        """The tokens that are predicted."""
        return [label for label in self.document.labels if label != IGNORE_INDEX]


def evaluate(
    model: nn.Module | Path | str,
    texts: Sequence[str | Conversation | Sequence[Any]],
    tokenizer: Any = None,
    *,
    sequence_length: int = 1024,
    device: torch.device | str | None = None,
    loss_on: LossOn = "assistant",
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Evaluation:
    """Held-out quality of a model (or of one in a directory, which then may bring the tokenizer).

    The texts are joined by the end-of-text token, as in training, and cut into windows of ``sequence_length`` that
    do not overlap in what they predict: every token is predicted exactly once, from those before it in its window.
    Where the tokenizer has no such token, the very first token is context only, and its bytes do not count. A
    token that the tokenizer puts before each document is context, as in training, and not counted as predicted.

    A list of messages is rendered by the chat template; what training counts is counted: with ``loss_on="assistant"``
    what the assistant says, the rest is context.

    No pass makes more than 256 MiB of logits: fewer windows at once, and a window that is too long alone goes through
    the rollout where the model can be rolled out. Raises ``ConfigError`` when there is nothing to predict.
    """
    if isinstance(model, (str, Path)):
        settings = ModelConfig(
            repo_id=str(Path(model).resolve()), allow_pickle=allow_pickle, trust_remote_code=trust_remote_code
        )
        tokenizer = tokenizer or load_tokenizer(Path(model), trust_remote_code=trust_remote_code)
        model = load_model(Path(model), settings)
        model.to(torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    if tokenizer is None:
        raise ConfigError("evaluate needs the tokenizer of a model that is given as an object.")
    read = passages(texts, tokenizer, loss_on=loss_on)
    stream, owners, num_bytes = _stream(read, tokenizer)
    tokens = sum(label != IGNORE_INDEX for label in stream.labels[1:])
    if tokens == 0 or num_bytes <= 0:
        raise ConfigError(f"there is nothing to predict in the {len(texts)} texts given.")
    place = next(model.parameters()).device
    windows = _windows(stream, sequence_length, _windows_at_once(model, sequence_length))
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            roll_out = _is_to_be_rolled_out(model, sequence_length)
            parts = [
                _losses(model, inputs.to(place), targets.to(place), roll_out=roll_out).cpu()
                for inputs, targets in windows
            ]
    finally:
        model.train(was_training)
    losses = torch.cat(parts)
    total = float(losses.sum())
    loss = total / tokens
    return Evaluation(
        loss=loss,
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        bits_per_byte=total / math.log(2) / num_bytes,
        tokens=tokens,
        bytes=num_bytes,
        documents=_by_document(losses, owners, stream),
    )


def passages(
    texts: Sequence[str | Conversation | Sequence[Any]], tokenizer: Any, *, loss_on: LossOn = "assistant"
) -> list[Passage]:
    """The texts and conversations that are not empty, with what of them is to be predicted, ends included."""
    items: list[str | Transcript] = []
    numbers: list[int] = []
    for number, text in enumerate(texts):
        if not text:
            continue
        numbers.append(number)
        if not isinstance(text, str):
            chat = text if isinstance(text, Conversation) else Conversation(text)
            spoken = loss_on == "assistant"
            items.append(transcribe(chat, tokenizer, find_spoken=spoken, row=f"held-out text {number}"))
        else:
            items.append(text)
    read = []
    documents = encode(items, tokenizer, loss_on=loss_on)
    for number, item, document in zip(numbers, items, documents, strict=True):
        if not document.input_ids:
            continue
        labels = list(document.labels)
        if isinstance(item, str) and _begins(tokenizer, document.input_ids):
            labels[0] = IGNORE_INDEX
        counted = item if isinstance(item, str) else item.spoken_text if loss_on == "assistant" else item.text
        ended = end_document(Document(document.input_ids, labels), tokenizer.eos_token_id)
        read.append(Passage(ended, counted, number))
    return read


def _stream(read: Sequence[Passage], tokenizer: Any) -> tuple[Document, list[int], int]:
    """All passages in a row, the number of the text that each token is of, and how many bytes what is predicted after
    the first token stands for.
    """
    num_bytes = sum(len(passage.text.encode()) for passage in read)
    ids = [token for passage in read for token in passage.document.input_ids]
    labels = [label for passage in read for label in passage.document.labels]
    owners = [passage.index for passage in read for _ in passage.document.input_ids]
    if not ids or labels[0] == IGNORE_INDEX:
        return Document(ids, labels), owners, num_bytes
    end = tokenizer.eos_token_id
    if end is not None:
        return Document([end, *ids], [IGNORE_INDEX, *labels]), [owners[0], *owners], num_bytes
    return Document(ids, labels), owners, num_bytes - _bytes_of(ids[0], tokenizer)


def _bytes_of(token: int, tokenizer: Any) -> int:
    """How many bytes a token stands for, which may be a part of a character."""
    text = tokenizer.decode([token])
    if "\ufffd" not in text:
        return len(text.encode())
    piece = str(tokenizer.convert_ids_to_tokens(token))
    # A byte that no other token has, or the letters of a byte-level vocabulary, one for each byte.
    return 1 if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", piece) else len(piece)


def _by_document(losses: Tensor, owners: Sequence[int], stream: Document) -> tuple[DocumentLoss, ...]:
    """Losses [N] of the predicted tokens, in order, as means over the texts that they are of."""
    counted = torch.tensor(stream.labels[1:]) != IGNORE_INDEX
    owner = torch.tensor(owners[1:])[counted]
    tokens = torch.bincount(owner)
    sums = torch.bincount(owner, weights=losses)
    return tuple(
        DocumentLoss(index, float(sums[index]) / int(tokens[index]), int(tokens[index]))
        for index in tokens.nonzero().flatten().tolist()
    )


def _begins(tokenizer: Any, document: Sequence[int]) -> bool:
    """Whether a document begins with a token for that, told from the one at the end."""
    begin = tokenizer.bos_token_id
    return begin is not None and begin != tokenizer.eos_token_id and document[0] == begin


def _windows(stream: Document, length: int, at_once: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and, one later, targets, both [B, length]; the last window is as long as what is left."""
    num_targets = len(stream.input_ids) - 1
    full = num_targets // length

    def window(start: int, stop: int) -> tuple[Sequence[int], Sequence[int]]:
        return stream.input_ids[start:stop], stream.labels[start + 1 : stop + 1]

    for first in range(0, full, at_once):
        chosen = range(first, min(first + at_once, full))
        inputs, targets = zip(*(window(n * length, (n + 1) * length) for n in chosen), strict=True)
        yield torch.tensor(inputs), torch.tensor(targets)
    if full * length < num_targets:
        inputs_left, targets_left = window(full * length, num_targets)
        yield torch.tensor([inputs_left]), torch.tensor([targets_left])


def _windows_at_once(model: nn.Module, length: int) -> int:
    return min(max(LOGITS_BYTES // _logits_bytes(model, length), 1), WINDOWS_PER_BATCH)


def _logits_bytes(model: nn.Module, tokens: int) -> int:
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    return tokens * int(getattr(text_config, "vocab_size", 1)) * 4


def _is_to_be_rolled_out(model: nn.Module, length: int) -> bool:
    """Whether windows that are too long alone go through the rollout."""
    if _logits_bytes(model, length) <= LOGITS_BYTES:
        return False
    from metaflow_hf.rollout.probe import require

    try:
        require(model, exact=False)
    except UnsupportedModelError as error:
        logger.warning(f"all logits of {length:,} tokens are made at once: {error}")
        return False
    return True


def _losses(model: nn.Module, inputs: Tensor, targets: Tensor, *, roll_out: bool) -> Tensor:
    """The loss of each counted target [N], in order, in double precision."""
    if roll_out and _logits_bytes(model, inputs.numel()) > LOGITS_BYTES:
        return _rolled_out(model, inputs, targets)
    logits = model(input_ids=inputs, use_cache=False).logits
    losses = nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return losses[targets.flatten() != IGNORE_INDEX].double()


def _rolled_out(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """The same of one window, with the logits of one token chunk in memory at a time."""
    from metaflow_hf.rollout.causal_lm import CausalLM
    from metaflow_hf.rollout.passes import ChunkPasses, Plan
    from metaflow_hf.rollout.probe import require
    from metaflow_hf.rollout.sequence import TokenSequence

    lm = CausalLM(model)
    report = require(model, exact=False)
    places = torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs)
    chunk = max(LOGITS_BYTES // _logits_bytes(model, len(inputs)), 2)
    found: list[Tensor] = []

    def keep(logits: Tensor, wanted: Tensor) -> Tensor:
        found.append(nn.functional.cross_entropy(logits.float(), wanted, reduction="none").double())
        return found[-1]

    plan = Plan(
        chunk_size=chunk,
        exact=False,
        use_cpu_offload=False,
        gradient_checkpointing=False,
        ce_loss_fn=keep,
        attention_by_blocks=report.attention_by_blocks,
    )
    sequence = TokenSequence(inputs, targets, None, places, IGNORE_INDEX)
    ChunkPasses(lm, sequence, plan, linear_head=report.linear_head).losses()
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)
