"""Rows -> examples of tokens with labels, the same on every machine."""

import copy
import datetime as dt
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from metaflow_hf.data.chat import ChatTemplate, Transcript, missing_prompt, read_chat_template, transcribe
from metaflow_hf.data.formats import (
    Conversation,
    DetectedFormat,
    Example,
    Instruction,
    PromptCompletion,
    RowProblem,
    detect_format,
)
from metaflow_hf.errors import BadRowError

logger = logging.getLogger("metaflow_hf.data")

IGNORE_INDEX: Final = -100

LossOn = Literal["assistant", "all"]


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """Tokens of one row; ``labels`` has the length of ``input_ids``: the token where it carries loss, else -100.

    Labels are not shifted. ``row`` is the index of the row that it is of. ``is_ended`` says that nothing is to be put
    behind it any more.
    """

    input_ids: Sequence[int]
    labels: Sequence[int]
    row: int = 0
    is_ended: bool = False

    def cut(self, start: int, stop: int) -> "EncodedExample":
        """Tokens ``[start, stop)`` of it."""
        is_ended = self.is_ended and stop >= len(self.input_ids)
        return EncodedExample(self.input_ids[start:stop], self.labels[start:stop], self.row, is_ended)

    @property
    def num_labels(self) -> int:
        """How many tokens carry loss."""
        return sum(label != IGNORE_INDEX for label in self.labels)


class ExampleEncoder:
    """Turns rows of one format into tokens, for one tokenizer.

    ``tokenizer`` is a transformers tokenizer. It adds to a text what it adds by default (one beginning, also where the
    text brings its own), and special tokens that are spelled out in a text become these tokens. Conversations are
    rendered by its chat template. Each example ends with the end-of-sequence token, which is learned where what is
    before it is, unless it ends with it already.

    With ``loss_on="all"`` everything is learned, otherwise answers: turns of the assistant, completions, outputs.
    ``template_date`` is the date that templates print which ask for the current one.
    """

    def __init__(
        self,
        tokenizer: Any,
        form: DetectedFormat,
        *,
        loss_on: LossOn = "assistant",
        on_bad_row: Literal["raise", "skip"] = "raise",
        template_date: dt.date | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.format = form
        self._learn_all = loss_on == "all"
        self._on_bad_row = on_bad_row
        self._template = ChatTemplate(tokenizer, date=template_date)
        # A tokenizer looks these up anew each time that it is asked.
        self._begin, self._end = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._spelled_begin, self._spelled_end = tokenizer.bos_token, tokenizer.eos_token
        # How many rows were skipped, by reason, and how many examples lost the thoughts of their turns.
        self.skipped: Counter[str] = Counter()
        self.without_thoughts = 0
        self._misses_prompt = False

    @property
    def skips_bad_rows(self) -> bool:
        """Whether rows that cannot be used are skipped instead of refused."""
        return self._on_bad_row == "skip"

    def encode(
        self, rows: Iterable[Mapping[str, Any]], *, name_row: Callable[[int], str] = "row {}".format
    ) -> list[EncodedExample]:
        """The examples of rows, in order; rows without content give none, some conversations several.

        Raises ``BadRowError`` for a row that cannot be used, named by ``name_row(index)``; with ``on_bad_row="skip"``
        such rows give nothing, and are counted and logged.
        """
        transcripts: list[Transcript] = []
        numbers: list[int] = []
        for number, row in enumerate(rows):
            try:
                example = self.format.example(row)
                rendered = [] if example is None else self.render(example)
            except RowProblem as problem:
                message = f"{name_row(number)}: {problem}."
                if self._on_bad_row == "raise":
                    raise BadRowError(message, row=number) from problem
                self.skipped[_reason(problem)] += 1
                logger.warning(f"left out of training: {message}")
                continue
            if example is None:
                self.skipped["blank"] += 1
            self._count_thoughts(rendered)
            transcripts += rendered
            numbers += [number] * len(rendered)
        encoded = self.tokenize(transcripts)
        return [replace(one, row=number) for one, number in zip(encoded, numbers, strict=True)]

    def _count_thoughts(self, rendered: Sequence[Transcript]) -> None:
        lost = sum(not one.has_thoughts for one in rendered)
        if lost and not self.without_thoughts:
            logger.warning(
                "the chat template leaves thoughts of the assistant out, so they are not trained: set data.chat_template "
                "to one that keeps them"
            )
        self.without_thoughts += lost

    def _warn_of_missing_prompt(self, example: Conversation, text: str) -> None:
        if self._misses_prompt:
            return
        before = example.messages[: example.learned_turns()[-1]]
        missing = missing_prompt(before, example.tools, text)
        if missing is not None:
            self._misses_prompt = True
            logger.warning(
                f"the chat template leaves {missing} out, so the model does not see it before it answers: take a model "
                "whose template knows it, or set data.chat_template"
            )

    def render(self, example: Example) -> list[Transcript]:
        """What an example says as text, with the parts that are learned. Raises ``RowProblem``."""
        if isinstance(example, Instruction):
            example = example.as_conversation() if self._template else example.as_prompt()
        if isinstance(example, Conversation):
            if not self._template:
                raise RowProblem(
                    "it is a conversation, but the tokenizer of this model has no chat template: take a model with one, "
                    "or set data.chat_template"
                )
            rendered = transcribe(example, self._template, learn_all=self._learn_all)
            self._warn_of_missing_prompt(example, rendered[-1].text)
            return rendered
        prompt = example.prompt if isinstance(example, PromptCompletion) else ""
        text = prompt + (example.completion if isinstance(example, PromptCompletion) else example)
        start = 0 if self._learn_all else len(prompt)
        return [Transcript(text, ((start, len(text)),), adds_special_tokens=True)]

    def tokenize(self, transcripts: Sequence[Transcript]) -> list[EncodedExample]:
        """The tokens of rendered texts, in order."""
        # In batches, because fast tokenizers work on those in parallel.
        found: list[EncodedExample | None] = [None] * len(transcripts)
        for special in (True, False):
            for whole in (True, False):
                numbers = [
                    number
                    for number, one in enumerate(transcripts)
                    if one.adds_special_tokens == special and _is_whole(one) == whole
                ]
                chosen = [transcripts[number] for number in numbers]
                for number, example in zip(numbers, self._tokenize(chosen, special, whole), strict=True):
                    found[number] = example
        return [example for example in found if example is not None]

    def _tokenize(self, chosen: Sequence[Transcript], special: bool, whole: bool) -> list[EncodedExample]:
        if not chosen:
            return []
        texts = [one.text for one in chosen]
        if not whole and not getattr(self.tokenizer, "is_fast", False):
            return [self._tokenize_in_pieces(one) for one in chosen]
        encoded = self.tokenizer(
            texts, add_special_tokens=special, return_offsets_mapping=not whole, verbose=False
        )
        all_ids = encoded["input_ids"]
        if whole:
            labels = all_ids
        else:
            labels = [
                [
                    token if one.is_learned(*place) else IGNORE_INDEX
                    for token, place in zip(ids, places, strict=True)
                ]
                for one, ids, places in zip(chosen, all_ids, encoded["offset_mapping"], strict=True)
            ]
        return [
            self._ended(one, ids, learned) for one, ids, learned in zip(chosen, all_ids, labels, strict=True)
        ]

    def _tokenize_in_pieces(self, one: Transcript) -> EncodedExample:
        """For a tokenizer that does not say where its tokens lie: a prompt and its completion, one after the other."""
        start = one.learned[0][0]
        prompt = self.tokenizer(one.text[:start], verbose=False)["input_ids"]
        if prompt and prompt[-1] == self.tokenizer.eos_token_id:
            prompt = prompt[:-1]
        completion = self.tokenizer(one.text[start:], add_special_tokens=False, verbose=False)["input_ids"]
        return self._ended(one, [*prompt, *completion], [*[IGNORE_INDEX] * len(prompt), *completion])

    def _ended(self, one: Transcript, ids: Sequence[int], labels: Sequence[int]) -> EncodedExample:
        """With one beginning, where the tokenizer has one, and one end."""
        begin, end = self._begin, self._end
        if one.adds_special_tokens:
            # A text that was rendered for this model brings its beginning, or its end, along.
            if (
                begin is not None
                and ids[:2] == [begin, begin]
                and not one.text.startswith(self._spelled_begin * 2)
            ):
                ids, labels = ids[1:], labels[1:]
            if end is not None and ids[-2:] == [end, end] and not one.text.endswith(self._spelled_end * 2):
                ids, labels = ids[:-1], labels[:-1]
        if end is None or not ids:
            return EncodedExample(ids, labels, is_ended=bool(ids))
        if self._ends(one.text, ids, end):
            if ids[-1] == end and labels[-1] == IGNORE_INDEX and one.ends_learned:
                labels = [*labels[:-1], end]
            return EncodedExample(ids, labels, is_ended=True)
        label = end if one.ends_learned else IGNORE_INDEX
        return EncodedExample([*ids, end], [*labels, label], is_ended=True)

    def _ends(self, text: str, ids: Sequence[int], end: int) -> bool:
        """Whether the last token is the end, but for white space behind it."""
        if ids[-1] == end or not text[-1:].isspace():
            return ids[-1] == end
        for token in reversed(ids):
            if token == end:
                return True
            if self.tokenizer.decode([token]).strip():
                return False
        return False


def encode_examples(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    *,
    format: str = "auto",  # noqa: A002  the name of the setting
    columns: Mapping[str, str] | None = None,
    chat_template: str | None = None,
    loss_on: LossOn = "assistant",
    max_length: int | None = None,
) -> list[EncodedExample]:
    """Rows as a training would encode them: one example per row, or one per turn where the chat template asks for it.

    Args:
        rows: Rows as ``open_rows`` gives them. Rows without content give no example.
        tokenizer: A transformers tokenizer.
        format: ``auto``, the name of a row format, or ``module:attribute`` of one of your own.
        columns: Role -> column name, for columns that are not named as usual.
        chat_template: Jinja, a file, a directory with a tokenizer, or a name; default is the tokenizer's own.
        loss_on: Whose words carry loss: ``assistant`` (also completions and outputs), or ``all``.
        max_length: Longer examples are cut off there, in tokens.

    Raises:
        FormatError: when the format is not certain.
        BadRowError: for a row that cannot be encoded, with its number as ``row``.
        ConfigError: for a chat template that does not exist.

    """
    rows = list(rows)
    if chat_template is not None:
        text = read_chat_template(chat_template, tokenizer)
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = text
    encoder = ExampleEncoder(tokenizer, detect_format(rows, format=format, columns=columns), loss_on=loss_on)
    examples = encoder.encode(rows)
    return examples if max_length is None else [example.cut(0, max_length) for example in examples]


def end_example(example: EncodedExample, eos_token_id: int | None) -> EncodedExample:
    """The example with the token that ends it, unless it has it already (or there is none).

    That token carries loss only if what is before it does.
    """
    if example.is_ended or eos_token_id is None or example.input_ids[-1] == eos_token_id:
        return example
    label = eos_token_id if example.labels[-1] != IGNORE_INDEX else IGNORE_INDEX
    return EncodedExample([*example.input_ids, eos_token_id], [*example.labels, label], example.row, True)


def _is_whole(one: Transcript) -> bool:
    return one.learned == ((0, len(one.text)),)


def _reason(problem: RowProblem) -> str:
    """The kind of a problem, without what is particular to its row."""
    return problem.kind
