"""What one row says, before any tokenizer: a text, a prompt with its completion, an instruction, or a conversation."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

ASSISTANT: Final = "assistant"

ALPACA_WITH_INPUT: Final = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_WITHOUT_INPUT: Final = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


class RowProblem(ValueError):  # noqa: N818  a reason, which becomes a BadRowError with the number of the row
    """Why a row cannot be used, without its number; ``kind`` says it in two or three words, for counting."""

    def __init__(self, message: str, *, kind: str = "malformed") -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class PromptCompletion:
    """Two texts, one directly after the other; the completion carries the loss."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """``messages`` with ``role``, ``content`` and the other keys that chat templates know, and the ``tools`` on offer.

    ``tools`` are JSON schemas. Turns of the assistant carry the loss, those from message ``learned_from`` on.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Any] | None = None
    learned_from: int = 0

    def learned_turns(self) -> list[int]:
        """The numbers of the messages that carry the loss: those of the assistant without ``weight: 0``."""
        return [
            number
            for number, message in enumerate(self.messages)
            if number >= self.learned_from and message["role"] == ASSISTANT and message.get("weight") != 0
        ]


@dataclass(frozen=True, slots=True)
class Instruction:
    """An instruction, with an input and a system prompt where there are any, and the output, which carries the loss."""

    instruction: str
    output: str
    input: str = ""
    system: str = ""

    def as_prompt(self) -> PromptCompletion:
        """Alpaca's own prompt (https://github.com/tatsu-lab/stanford_alpaca)."""
        template = ALPACA_WITH_INPUT if self.input.strip() else ALPACA_WITHOUT_INPUT
        prompt = template.format_map({"instruction": self.instruction, "input": self.input})
        return PromptCompletion(f"{self.system}\n\n{prompt}" if self.system else prompt, self.output)

    def as_conversation(self, earlier: Sequence[Mapping[str, Any]] = ()) -> Conversation:
        """The instruction, and the input on the next line, as the user's turn; the output as the assistant's.

        Joined as LLaMA-Factory and axolotl do it. ``earlier`` turns are not learned.
        """
        asked = f"{self.instruction}\n{self.input}" if self.input.strip() else self.instruction
        system = [{"role": "system", "content": self.system}] if self.system else []
        turn = [{"role": "user", "content": asked}, {"role": ASSISTANT, "content": self.output}]
        return Conversation([*system, *earlier, *turn], learned_from=len(system) + len(earlier))


Example = str | PromptCompletion | Conversation | Instruction


def contents(example: Example) -> Any:
    """The example as plain JSON values, equal for equal examples."""
    match example:
        case str():
            return example
        case PromptCompletion():
            return [example.prompt, example.completion]
        case Instruction():
            more = [example.system] if example.system else []
            return [example.instruction, example.input, example.output, *more]
        case Conversation():
            return [list(example.messages), None if example.tools is None else list(example.tools)]


def show(example: Example) -> str:
    """The example as text for people, without a tokenizer."""
    if isinstance(example, str):
        return example
    if isinstance(example, Conversation):
        return "\n".join(
            f"{message['role']}: {message.get('content') or json.dumps(message.get('tool_calls'))}"
            for message in example.messages
        )
    whole = example.as_prompt() if isinstance(example, Instruction) else example
    return whole.prompt + whole.completion
