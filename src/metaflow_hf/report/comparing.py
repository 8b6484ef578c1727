"""Several models beside each other: the same texts, the same prompts, best first."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from metaflow_hf.report import units
from metaflow_hf.report.page import Block, Code, Grid, Heading, Page, Tile, Tiles, Title
from metaflow_hf.report.text import columns, indented, plain

HEADERS = ("model", "bits per byte", "loss (nats/token)", "perplexity", "tokens")


@dataclass(frozen=True, kw_only=True)
class Compared:
    """What one model did with the texts and prompts that all were given; ``samples`` are (prompt, text).

    Loss and perplexity compare models of one tokenizer only; bits per byte compare all.
    """

    name: str
    key: str
    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    samples: tuple[tuple[str, str], ...] = ()


def best_first(found: Iterable[Compared]) -> list[Compared]:
    """By bits per byte, the lowest first; what is not a number is no better than anything, and comes last."""
    return sorted(found, key=lambda one: (math.isnan(one.bits_per_byte), one.bits_per_byte))


def comparison_rows(found: Sequence[Compared]) -> list[tuple[str, ...]]:
    """One row a model, in the order given."""
    return [
        (
            plain(one.name).replace("\n", " "),
            f"{one.bits_per_byte:.3f}",
            f"{one.loss:.3f}",
            units.perplexity(one.perplexity),
            units.count(one.tokens),
        )
        for one in found
    ]


def comparison_text(found: Sequence[Compared]) -> str:
    """The table as aligned lines for a log."""
    return "\n".join(["Models, best first", *indented(columns([HEADERS, *comparison_rows(found)]))])


def comparison_page(found: Sequence[Compared]) -> Page:
    """The table, the best figure first, and what each model wrote."""
    best = best_first(found)[0]
    blocks: list[Block] = [
        Title(f"{len(found)} models compared" if len(found) != 1 else "1 model measured"),
        Tiles(
            (
                Tile("best", best.name, f"{best.bits_per_byte:.3f} bits per byte", is_good=len(found) > 1),
                Tile("models", str(len(found)), "same texts, same prompts"),
            )
        ),
        Heading("Held-out text", "lower is better; bits per byte compare models of different tokenizers"),
        Grid(
            HEADERS,
            tuple(comparison_rows(found)),
            numeric=frozenset({1, 2, 3, 4}),
            strong_rows=frozenset(number for number, one in enumerate(found) if one is best),
        ),
    ]
    for prompt in dict.fromkeys(prompt for one in found for prompt, _ in one.samples):
        blocks.append(Heading("What they write", f"prompt: {prompt}"))
        for one in found:
            written = [text for known, text in one.samples if known == prompt]
            blocks += [block for text in written for block in (Heading(one.name), Code(text))]
    blocks += [Heading("References"), Grid(("model", "key"), tuple((one.name, one.key) for one in found))]
    return Page(tuple(blocks))
