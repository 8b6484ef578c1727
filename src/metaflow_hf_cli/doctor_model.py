"""What the chunked rollout does with a model of the hub: from its configuration, before any weights are downloaded."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from metaflow._vendor import click

from .output import print_json, print_table, printable

if TYPE_CHECKING:
    from metaflow_hf.rollout.forecast import Forecast

# (what people call the card, memory in bytes): shown where no GPU is at hand.
_CARDS = (("a GPU of 24 GiB", 24 * 2**30), ("a GPU of 80 GiB", 80 * 2**30), ("a GPU of 141 GiB", 141 * 2**30))
_GRADIENTS: tuple[Literal["exact", "truncated"], ...] = ("exact", "truncated")


def show(model: str, chunk_size: int, as_json: bool) -> None:
    """Prints what gradients are possible and why not, what a token costs, and how long a sequence can be."""
    from metaflow_hf.rollout.forecast import forecast

    found = forecast(_configuration(model))
    cards = _cards()
    longest = {
        name: {kind: found.longest(size, gradient=kind, chunk_size=chunk_size) for kind in _GRADIENTS}
        for name, size in cards
    }
    if as_json:
        print_json(_as_json(model, found, chunk_size, longest))
        return
    click.echo(f"{printable(model)}: {found.name}, {found.parameters:,} parameters")
    click.echo(f"gradients in token chunks: {verdict(found)}")
    for reason in found.report.reasons:
        click.echo(f"  {printable(reason)}")
    if not found.report.truncated:
        return
    attention = (
        "by blocks, without a mask over the past" if found.report.attention_by_blocks else "transformers' own"
    )
    head = "never makes all logits" if found.report.linear_head else "makes the logits of one token chunk"
    click.echo(f"attention: {attention}; loss: {head}")
    click.echo(_sizes(found))
    if found.bytes_per_token is None:
        return
    click.echo(f"longest sequence, about, all weights trained with AdamW, token chunks of {chunk_size:,}:")
    rows = [
        (name, *(_tokens(found, by_kind[kind]) for kind in _GRADIENTS)) for name, by_kind in longest.items()
    ]
    print_table(("ON", ">EXACT", ">TRUNCATED"), rows, empty="")


def verdict(found: "Forecast") -> str:
    """One word for people."""
    if found.report.exact and found.report.truncated:
        return "exact, or truncated"
    return "truncated only" if found.report.truncated else "refused"


def _configuration(model: str) -> Any:
    from transformers import AutoConfig

    from metaflow_hf.errors import UnsupportedModelError
    from metaflow_hf.hub import hf_hub_download

    directory = Path(model)
    if not (directory / "config.json").is_file():
        repo_id, _, revision = model.partition("@")
        directory = Path(hf_hub_download(repo_id, "config.json", revision=revision or None)).parent
    try:
        return AutoConfig.from_pretrained(directory)
    except (ValueError, KeyError) as error:
        raise UnsupportedModelError(
            f"{model}: this version of transformers does not know its configuration ({' '.join(str(error).split())})"
        ) from error


def _cards() -> list[tuple[str, int]]:
    import torch

    if not torch.cuda.is_available():
        return list(_CARDS)
    seen = {}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        seen[f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"] = properties.total_memory
    return list(seen.items())


def _sizes(found: "Forecast") -> str:
    if found.bytes_per_token is None or found.bytes_per_token_chunk is None:
        return "carry: its size could not be found without weights"
    kib = found.bytes_per_token / 1024
    dtype = str(found.dtype).removeprefix("torch.")
    line = f"carry in {dtype}: {2 * kib:,.1f} KiB a token (exact), {kib:,.1f} KiB (truncated)"
    if found.bytes_per_token_chunk:
        line += f", and {found.bytes_per_token_chunk / 2**20:,.1f} MiB of states a token chunk"
    return line


def _tokens(found: "Forecast", tokens: int | None) -> str:
    if tokens is None:
        return "?"
    if tokens == 0:
        return "too small"
    return f"{tokens:,}" + (" (all its positions)" if tokens == found.positions else "")


def _as_json(model: str, found: "Forecast", chunk_size: int, longest: dict[str, Any]) -> dict[str, Any]:
    report = found.report
    return {
        "model": model,
        "architecture": found.name,
        "parameters": found.parameters,
        "exact": report.exact,
        "truncated": report.truncated,
        "reasons": list(report.reasons),
        "attention_by_blocks": report.attention_by_blocks,
        "linear_head": report.linear_head,
        "dtype": str(found.dtype).removeprefix("torch."),
        "bytes_per_token": found.bytes_per_token,
        "bytes_per_token_chunk": found.bytes_per_token_chunk,
        "positions": found.positions,
        "chunk_size": chunk_size,
        "longest": longest,
    }
