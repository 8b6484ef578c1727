"""How well a model predicts held-out text: loss, perplexity and bits per byte, with exact counts."""

import datetime as dt
import logging
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, cast

import torch
from torch import Tensor, nn

from metaflow_hf.config import ModelConfig
from metaflow_hf.data.batches import Packing
from metaflow_hf.data.formats import Conversation, DetectedFormat, Example, RowProblem
from metaflow_hf.data.formats.messages import read_messages
from metaflow_hf.data.tokens import IGNORE_INDEX, EncodedExample, ExampleEncoder, LossOn
from metaflow_hf.errors import BadRowError, ConfigError, UnsupportedModelError
from metaflow_hf.train.models import load_model, load_tokenizer

logger = logging.getLogger("metaflow_hf.train")

WINDOWS_PER_BATCH: Final = 8
# Logits of one pass, in fp32.
LOGITS_BYTES: Final = 256 * 2**20
_FEW_TOKENS: Final = 8
_TEXT: Final = DetectedFormat("text", {"text": "text"})


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

    document: EncodedExample
    text: str
    index: int = 0

    @property
    def predicted(self) -> list[int]:
        """The tokens that are predicted."""
        return [label for label in self.document.labels if label != IGNORE_INDEX]


def evaluate(
    model: nn.Module | Path | str,
    texts: Sequence[Example | Sequence[Any]],
    tokenizer: Any = None,
    *,
    sequence_length: int = 1024,
    packing: Packing = True,
    device: torch.device | str | None = None,
    loss_on: LossOn = "assistant",
    on_bad_row: Literal["raise", "skip"] = "raise",
    template_date: dt.date | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Evaluation:
    """Held-out quality of a model (or of one in a directory, which then may bring the tokenizer).

    The texts are joined by the end-of-text token, as in training, and cut into windows of ``sequence_length`` that
    do not overlap in what they predict: every token is predicted exactly once, from those before it in its window.
    Where the tokenizer has no such token, the very first token is context only, and its bytes do not count. A
    token that the tokenizer puts before each document is context, as in training, and not counted as predicted.

    Without ``packing``, or with ``isolated``, each text is predicted by itself, from its own beginning: its first token
    is context. What training counts is counted: with ``loss_on="assistant"`` of conversations, which the chat template
    renders, what the assistant says, of prompts with completions the completions; the rest is context.

    No pass makes more than 256 MiB of logits: fewer windows at once, and a window that is too long alone goes through
    the rollout where the model can be rolled out. Raises ``ConfigError`` when there is nothing to predict, and
    ``BadRowError`` for a text that the chat template does not take, unless bad ones are to be skipped.
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
    encoder = ExampleEncoder(
        tokenizer, _TEXT, loss_on=loss_on, on_bad_row=on_bad_row, template_date=template_date
    )
    read = passages(texts, encoder)
    streams = [_stream(read, tokenizer)] if packing is True else [_alone(one, tokenizer) for one in read]
    tokens = sum(stream.num_predicted for stream in streams)
    num_bytes = sum(stream.num_bytes for stream in streams)
    if tokens == 0 or num_bytes <= 0:
        raise ConfigError(f"there is nothing to predict in the {len(texts)} texts given.")
    place = next(model.parameters()).device
    windows = _windows(streams, sequence_length, _windows_at_once(model, sequence_length))
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
        documents=_by_document(losses, streams),
    )


def passages(texts: Sequence[Example | Sequence[Any]], encoder: ExampleEncoder) -> list[Passage]:
    """The texts that are not empty, with what of them is to be predicted, ends included.

    A conversation that the chat template rewrites is one passage for each turn of the assistant.
    """
    tokenizer = encoder.tokenizer
    read = []
    for number, text in enumerate(texts):
        if not text:
            continue
        is_list = isinstance(text, Sequence) and not isinstance(text, str)
        example = Conversation(read_messages(text, "messages")) if is_list else cast("Example", text)
        try:
            transcripts = encoder.render(example)
        except RowProblem as problem:
            message = f"held-out text {number}: {problem}."
            if not encoder.skips_bad_rows:
                raise BadRowError(message, row=number) from problem
            logger.warning(f"left out of the evaluation: {message}")
            continue
        for one, document in zip(transcripts, encoder.tokenize(transcripts), strict=True):
            if not document.input_ids:
                continue
            labels = list(document.labels)
            if one.adds_special_tokens and _begins(tokenizer, document.input_ids):
                labels[0] = IGNORE_INDEX
            read.append(Passage(replace(document, labels=labels), one.learned_text, number))
    return read


@dataclass(frozen=True, slots=True)
class _Stream:
    """Tokens in a row; ``owners`` has the number of the text that each is of, ``num_bytes`` is how many bytes those
    that are predicted stand for.
    """

    input_ids: Sequence[int]
    labels: Sequence[int]
    owners: Sequence[int]
    num_bytes: int

    @property
    def num_predicted(self) -> int:
        """How many tokens are predicted: none is, from nothing."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


def _stream(read: Sequence[Passage], tokenizer: Any) -> _Stream:
    """All passages in a row."""
    num_bytes = sum(len(passage.text.encode()) for passage in read)
    ids = [token for passage in read for token in passage.document.input_ids]
    labels = [label for passage in read for label in passage.document.labels]
    owners = [passage.index for passage in read for _ in passage.document.input_ids]
    if not ids or labels[0] == IGNORE_INDEX:
        return _Stream(ids, labels, owners, num_bytes)
    end = tokenizer.eos_token_id
    if end is not None:
        return _Stream([end, *ids], [IGNORE_INDEX, *labels], [owners[0], *owners], num_bytes)
    return _Stream(ids, labels, owners, num_bytes - _bytes_of(ids[0], tokenizer))


def _alone(passage: Passage, tokenizer: Any) -> _Stream:
    """One passage by itself: its first token is predicted from nothing, so it is not."""
    document, num_bytes = passage.document, len(passage.text.encode())
    if document.labels[0] != IGNORE_INDEX:
        num_bytes -= _bytes_of(document.input_ids[0], tokenizer)
    owners = [passage.index] * len(document.input_ids)
    return _Stream(document.input_ids, document.labels, owners, num_bytes)


def _bytes_of(token: int, tokenizer: Any) -> int:
    """How many bytes a token stands for, which may be a part of a character."""
    text = tokenizer.decode([token])
    if "\ufffd" not in text:
        return len(text.encode())
    piece = str(tokenizer.convert_ids_to_tokens(token))
    # A byte that no other token has, or the letters of a byte-level vocabulary, one for each byte.
    return 1 if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", piece) else len(piece)


def _by_document(losses: Tensor, streams: Sequence[_Stream]) -> tuple[DocumentLoss, ...]:
    """Losses [N] of the predicted tokens, in order, as means over the texts that they are of."""
    pairs = [pair for one in streams for pair in zip(one.labels[1:], one.owners[1:], strict=True)]
    owner = torch.tensor([number for label, number in pairs if label != IGNORE_INDEX])
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


def _windows(streams: Sequence[_Stream], length: int, at_once: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and, one later, targets, both [B, <= length], in the order of the tokens; windows of one batch are as long
    as each other.
    """
    batch: list[tuple[Sequence[int], Sequence[int]]] = []
    for stream in streams:
        for start in range(0, len(stream.input_ids) - 1, length):
            stop = min(start + length, len(stream.input_ids) - 1)
            window = stream.input_ids[start:stop], stream.labels[start + 1 : stop + 1]
            if batch and (len(batch) == at_once or len(batch[0][0]) != stop - start):
                yield _stacked(batch)
                batch = []
            batch.append(window)
    if batch:
        yield _stacked(batch)


def _stacked(batch: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[Tensor, Tensor]:
    inputs, targets = zip(*batch, strict=True)
    return torch.tensor(inputs), torch.tensor(targets)


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
