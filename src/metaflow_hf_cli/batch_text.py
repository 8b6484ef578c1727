"""A batch as people read it: tokens with loss told from those without."""

from typing import TYPE_CHECKING

from metaflow._vendor import click

if TYPE_CHECKING:
    from metaflow_hf.data.preview import PreviewedBatch


def print_batch(shown: "PreviewedBatch", *, colored: bool) -> None:
    """Tokens with loss are green; without color, those without are in ⟦ ⟧."""
    click.echo(f"{shown.summary()} ({'green' if colored else 'the others in ⟦ ⟧'})")
    for number, sequence in enumerate(shown.sequences):
        with_loss = sum(piece.has_loss for piece in sequence)
        click.echo(f"\nsequence {number}: {len(sequence):,} tokens, {with_loss:,} with loss")
        click.echo(
            "".join(_marked(text, has_loss, colored) for has_loss, text in shown.spans(number)), color=colored
        )


def _marked(text: str, has_loss: bool, colored: bool) -> str:
    if colored:
        return str(click.style(text, fg="green") if has_loss else click.style(text, dim=True))
    return text if has_loss else f"⟦{text}⟧"
