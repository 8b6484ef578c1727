"""Conversations -> texts as their chat template renders them, and which of it the assistant learns to say.

A template with ``{% generation %}`` marks says so itself. For any other the conversation is rendered up to each turn
of the assistant, and what a turn adds to the prompt for it is the turn. Where later turns change how earlier ones are
rendered (thoughts are taken out, an end of text is put behind the last turn), each turn gets a text of its own, with
the history as it is at inference, and only that turn is learned.

Whatever the template does, a turn that is to be learned must be found in what it renders for it.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from metaflow_hf.data.chat.stock_marks import moved_end, moved_start
from metaflow_hf.data.chat.template import ChatTemplate
from metaflow_hf.data.chat.verification import THOUGHTS, check_turn
from metaflow_hf.data.formats.examples import ASSISTANT, Conversation, RowProblem

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Transcript:
    """A rendered text, and the spans of characters ``[start, stop)`` of it that carry the loss.

    ``ends_learned`` says whether its end is learned, ``has_thoughts`` whether the template kept all thoughts of the
    turns. ``adds_special_tokens`` is for a text that no template rendered.
    """

    text: str
    learned: tuple[Span, ...]
    ends_learned: bool = True
    has_thoughts: bool = True
    adds_special_tokens: bool = False

    @property
    def learned_text(self) -> str:
        """What is learned, with the template's own ends of turns."""
        return "".join(self.text[start:stop] for start, stop in self.learned)

    def is_learned(self, start: int, stop: int) -> bool:
        """Whether a token at characters ``[start, stop)`` is learned, at least in part.

        Some tokenizers leave whitespace out of offsets: a token of nothing else lies at the end of its whitespace.
        """
        # Spans are in order, so only the last one that begins before the token may reach it.
        number = bisect_left(self.learned, (max(start, stop),)) - 1
        if number < 0:
            return False
        end = self.learned[number][1]
        return start < end if start < stop else start <= end


def transcribe(conversation: Conversation, template: ChatTemplate, *, learn_all: bool) -> list[Transcript]:
    """The conversation as the template renders it: one text, or one for each turn that is learned.

    With ``learn_all`` it is one text, of which everything is learned. Raises ``RowProblem`` for a conversation without
    a turn to learn, for a turn that is empty or that the template leaves out or changes, and for messages that the
    template refuses.
    """
    messages, tools = conversation.messages, conversation.tools
    turns = conversation.learned_turns()
    if not turns:
        raise RowProblem("no message of the assistant is to be learned", kind="no answer")
    for number in turns:
        if _is_empty(messages[number]):
            raise RowProblem(
                f"message {number + 1} (of the assistant) is empty, so there is nothing to learn",
                kind="empty answer",
            )
    if learn_all:
        text = template.render(messages, tools)
        kept = [check_turn(messages[number], text, number) for number in turns]
        return [Transcript(text, ((0, len(text)),), has_thoughts=all(kept))]
    if not getattr(template.tokenizer, "is_fast", False):
        raise RowProblem(
            f"{type(template.tokenizer).__name__} does not say which characters a token stands for, so the turns of the "
            "assistant cannot be told from the others: set data.loss_on: all, or take a model with a fast tokenizer"
        )
    if template.is_marked(tools):
        return _by_marks(conversation, turns, template)
    return _by_rendering(conversation, turns, template)


def _by_rendering(
    conversation: Conversation, turns: Sequence[int], template: ChatTemplate
) -> list[Transcript]:
    messages, tools = conversation.messages, conversation.tools
    whole = template.render(messages, tools)
    upto = [
        whole if number + 1 == len(messages) else template.render(messages[: number + 1], tools)
        for number in turns
    ]
    source = template.source(tools)
    spans = [
        (_start(conversation, number, text, template), moved_end(source, text, len(text)))
        for number, text in zip(turns, upto, strict=True)
    ]
    kept = [
        check_turn(messages[number], text[start:stop], number)
        for number, text, (start, stop) in zip(turns, upto, spans, strict=True)
    ]
    if all(map(whole.startswith, upto)):
        ended = [(start, _end(whole, stop, template)) for start, stop in spans]
        ends_learned = turns[-1] + 1 == len(messages)
        return [Transcript(whole, tuple(ended), ends_learned, has_thoughts=all(kept))]
    return [
        Transcript(text, (span,), has_thoughts=has_thoughts)
        for text, span, has_thoughts in zip(upto, spans, kept, strict=True)
    ]


def _start(conversation: Conversation, number: int, upto: str, template: ChatTemplate) -> int:
    """Where message ``number`` begins in the text up to it: behind the prompt for it, as far as that is the same.

    Prompts may hold more than the turn begins with, such as the beginning of thoughts.
    """
    if number == 0:
        return _start_of_first(conversation, upto, template)
    messages, tools = conversation.messages[:number], conversation.tools
    prompt, header = template.render(messages, tools, add_generation_prompt=True), template.header
    if (
        upto.startswith(prompt)
        and header
        and prompt.endswith(header)
        and not upto.startswith(header, len(prompt))
    ):
        return moved_start(template.source(tools), upto, len(prompt) - len(header), len(prompt))
    start = len(prompt) if upto.startswith(prompt) else _common_tokens(prompt, upto, template)
    before = template.render(messages, tools)
    history = _common(before, upto)
    # An end of text behind the history is in neither.
    if start < history or history < _common(before, prompt):
        raise RowProblem(
            f"the model's chat template renders message {number + 1} in another way than it asks for it, so what the "
            "assistant says is not certain: set data.chat_template to one with {% generation %} marks, or "
            "data.loss_on: all"
        )
    if header and upto.startswith(header, start):
        # The prompt leaves out what the turn begins with, because the one before was the assistant's too.
        return start + len(header)
    return moved_start(template.source(tools), upto, history, start)


def _end(text: str, stop: int, template: ChatTemplate) -> int:
    """Where a turn ends: behind the token that begins the next one, where the template has none for the end."""
    if template.ends_turns:
        return stop
    following = [token for token in template.special_tokens if text.startswith(token, stop)]
    return stop + max(map(len, following), default=0)


def _start_of_first(conversation: Conversation, upto: str, template: ChatTemplate) -> int:
    """Nothing is before it, and no template renders nothing: its header is what asks for a turn after it."""
    asking = template.render(conversation.messages[:1], conversation.tools, add_generation_prompt=True)
    header = asking[_common(asking, upto) :]
    at = upto.find(header)
    if at < 0:
        raise RowProblem(
            "the first message is of the assistant, and the model's chat template has no prompt for it"
        )
    return at + len(header)


def _common(one: str, other: str) -> int:
    """With how many characters both texts begin."""
    if other.startswith(one):
        return len(one)
    pairs = enumerate(zip(one, other, strict=False))
    return next((number for number, (left, right) in pairs if left != right), min(len(one), len(other)))


def _common_tokens(prompt: str, upto: str, template: ChatTemplate) -> int:
    """The character behind the tokens with which both texts begin."""
    encode: Any = template.tokenizer
    one = encode(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    other = encode(upto, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    end = 0
    for token, same, (_, stop) in zip(one, other["input_ids"], other["offset_mapping"], strict=False):
        if token != same:
            break
        end = stop
    return end


def _by_marks(conversation: Conversation, turns: Sequence[int], template: ChatTemplate) -> list[Transcript]:
    """By the template's own marks: one text, unless some turns of the assistant are not learned."""
    messages, tools = conversation.messages, conversation.tools
    speaking = [number for number, message in enumerate(messages) if message["role"] == ASSISTANT]
    text, spans = _marked(conversation, len(messages), template)
    if len(turns) == len(speaking):
        learned = "".join(text[start:stop] for start, stop in spans)
        kept = [check_turn(messages[number], learned, number) for number in turns]
        return [Transcript(text, tuple(spans), turns[-1] + 1 == len(messages), has_thoughts=all(kept))]
    transcripts = []
    for number in turns:
        upto, spans = _marked(conversation, number + 1, template)
        before = _common(template.render(messages[:number], tools), upto) if number else 0
        spans = [span for span in spans if span[1] > before]
        is_whole = check_turn(messages[number], "".join(upto[start:stop] for start, stop in spans), number)
        transcripts.append(Transcript(upto, tuple(spans), has_thoughts=is_whole))
    if all(text.startswith(one.text) for one in transcripts):
        found = tuple(span for one in transcripts for span in one.learned)
        has_thoughts = all(one.has_thoughts for one in transcripts)
        return [Transcript(text, found, turns[-1] + 1 == len(messages), has_thoughts)]
    return transcripts


def _marked(conversation: Conversation, count: int, template: ChatTemplate) -> tuple[str, list[Span]]:
    """The text of the first messages, and the runs of tokens between the template's own marks."""
    messages = conversation.messages[:count]
    encoded = template.apply(
        messages,
        conversation.tools,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"return_offsets_mapping": True},
    )
    places = zip(encoded["offset_mapping"], encoded["assistant_masks"], strict=True)
    return template.render(messages, conversation.tools), list(_runs(places))


def _runs(places: Iterator[tuple[Span, int]]) -> Iterator[Span]:
    run: Span | None = None
    for (start, stop), is_marked in places:
        if is_marked:
            run = (start if run is None else run[0], stop)
        elif run is not None:
            yield run
            run = None
    if run is not None:
        yield run


def _is_empty(message: Any) -> bool:
    said = [message["content"], *(message.get(key) or "" for key in THOUGHTS)]
    return not message.get("tool_calls") and not any(str(text).strip() for text in said)
