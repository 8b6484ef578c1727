"""The splits that a location names, in the words of `datasets`: `train`, `train[:10%]`, `train+test`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from metaflow_hf.errors import SelectionError

DEFAULT: Final = "train"
_NAME: Final = re.compile(r"\w+(\.\w+)*")


@dataclass(frozen=True, slots=True)
class SplitPart:
    """One split, and which rows of it: ``instruction`` is `train[:10%]`, or ``None`` for all."""

    split: str
    instruction: str | None = None


def choose_splits(
    asked: str | None, known: Sequence[str], *, where: str, config: str = ""
) -> list[SplitPart]:
    """The splits to read, in order.

    Args:
        asked: What the user wrote; by default `train`, or the only split there is.
        known: The splits of the configuration.
        where: The location, for messages.
        config: The name of the configuration, for messages.

    Raises:
        SelectionError: A split does not exist, none is asked for although there are several and no `train`, or
            the text is no split.

    """
    parts = _parse(asked, where) if asked else [SplitPart(_default(known, where, config))]
    for part in parts:
        if part.split not in known:
            raise SelectionError(
                f"{where}: there is no split {part.split!r}{_within(config)}, only {', '.join(known) or 'none'}. "
                f"{_name_one(where, config)}"
            )
    return parts


def bounds(part: SplitPart, num_rows: int) -> tuple[int, int]:
    """The first row of a part, and the row behind its last, of a split with ``num_rows`` rows."""
    import datasets

    instruction = datasets.ReadInstruction.from_spec(part.instruction or part.split)
    (absolute,) = instruction.to_absolute({part.split: num_rows})
    return absolute.from_, absolute.to


def _default(known: Sequence[str], where: str, config: str) -> str:
    if DEFAULT in known:
        return DEFAULT
    if len(known) == 1:
        return known[0]
    raise SelectionError(
        f"{where} has no split {DEFAULT!r}{_within(config)}, but {', '.join(known) or 'none at all'}. "
        f"{_name_one(where, config)}"
    )


def _within(config: str) -> str:
    return f" in configuration {config!r}" if config else ""


def _name_one(where: str, config: str) -> str:
    return f"Name one: {where}:{config}:SPLIT."


def _parse(asked: str, where: str) -> list[SplitPart]:
    parts = []
    for text in map(str.strip, asked.split("+")):
        if _NAME.fullmatch(text):
            parts.append(SplitPart(text))
            continue
        import datasets

        try:
            datasets.ReadInstruction.from_spec(text)
        except (ValueError, AssertionError) as error:
            raise SelectionError(
                f"{where}: {asked!r} is not a split: write train, train[:10%], train[100:200] or train+test."
            ) from error
        parts.append(SplitPart(text.partition("[")[0].partition("(")[0], text))
    return parts
